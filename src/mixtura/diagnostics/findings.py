"""What a diagnosis says in words: the verdict first, then what to know before believing it.

Specialisation is claimed where chance reaches it in fewer than one of twenty permutations, divided by the number of
layers that were looked at (Bonferroni).
"""

from collections.abc import Sequence

from mixtura.diagnostics.diagnosed import (
    ByTokenType,
    DiagnosisVerdict,
    GroupFacts,
    LayerDiagnosis,
    LeakFindings,
    ModelFacts,
)

SIGNIFICANCE = 0.05
FEW_EXCERPTS = 10


def verdict(
    model: ModelFacts, groups: Sequence[GroupFacts], layers: Sequence[LayerDiagnosis], *, group_word: str
) -> DiagnosisVerdict:
    """The headline, about the layer whose experts tell most, and the sentences below it."""
    if not layers:
        return DiagnosisVerdict(_nothing_routed(model), [], None)
    word, many = group_word, len(groups) > 1
    by_type = _claim([layer.token_types for layer in layers], layers, "the kind of token")
    if not many:
        headline, place = by_type
        sentences = [f"One {word} was given, so only kinds of tokens can be compared."]
    else:
        headline, place = _claim(layers, layers, f"the {word}")
        sentences = [by_type[0]]
    return DiagnosisVerdict(headline, [*sentences, _load_sentence(layers)], place)


def bits(value: float) -> str:
    """Two decimals; three below a tenth, where chance is."""
    if 0 < value < 0.0005:
        return "<\N{NO-BREAK SPACE}0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _claim(
    measures: Sequence[ByTokenType | LayerDiagnosis], layers: Sequence[LayerDiagnosis], about: str
) -> tuple[str, int]:
    """A sentence on the layer whose experts tell most, and its place."""
    place = max(range(len(measures)), key=lambda i: measures[i].corrected)
    found, depth = measures[place], layers[place].layer
    most = min(found.max_bits, found.group_bits)
    amount = f"{bits(found.mutual_information)} of {bits(most)} bits about {about}"
    chance = f"chance gives {bits(found.chance).replace('<', 'less than')}"
    if found.p_value * len(measures) > SIGNIFICANCE:
        return (
            f"No layer's experts tell {about} better than chance: the most is {amount}, in layer {depth}; {chance}.",
            place,
        )
    return f"Layer {depth}'s experts carry {amount}; {chance}.", place


def _nothing_routed(model: ModelFacts) -> str:
    if model.unread_layers:
        return "In this model tokens compete for experts, so no token has experts of its own and none can be read."
    return "This model routes nothing: it is dense, so there are no experts to diagnose."


def _load_sentence(layers: Sequence[LayerDiagnosis]) -> str:
    dead = sum(len(layer.dead) for layer in layers)
    total = sum(layer.num_experts for layer in layers)
    worst = max(layers, key=lambda layer: layer.load.imbalance)
    busy = f"the busiest, in layer {worst.layer}, has {worst.load.imbalance:.1f} times an even share of the rows"
    if not dead:
        return f"All {total} experts are used; {busy}."
    return f"{dead} of {total} experts are dead; {busy}."


def cautions(
    model: ModelFacts, groups: Sequence[GroupFacts], layers: Sequence[LayerDiagnosis], leaks: LeakFindings
) -> list[str]:
    """Sentences on what weakens the numbers, the gravest first."""
    found = []
    if leaks.future:
        found.append("A token's output depends on later tokens: as a causal language model this cannot be deployed.")
    if leaks.batch:
        found.append("A token's output depends on other examples of its batch, so it is not reproducible when served.")
    if model.route_by != "token" and layers:
        found.append(
            f"The experts of this model are named by the {model.route_by} of an example, so what they tell about it "
            "is so by construction and was not learned."
        )
    if model.unread_layers and layers:
        found.append(f"Layers whose tokens compete are left out: {', '.join(model.unread_layers)}.")
    few = [group.name for group in groups if group.excerpts < FEW_EXCERPTS]
    if few and len(groups) > 1 and layers:
        found.append(
            f"There are fewer than {FEW_EXCERPTS} excerpts of {', '.join(few)}: give more text, or chance drowns what "
            "the experts tell."
        )
    return found
