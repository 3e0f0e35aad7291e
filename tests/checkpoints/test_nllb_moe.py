"""NLLB-MoE by its paper's formula, in training as its authors' code, and pruned for some languages."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, M2M100Config, M2M100ForConditionalGeneration

from fixtures.encoder_decoders import encoder_decoder  # noqa: F401 - a fixture
from mixtura.checkpoints.nllb_moe import compute_as_published, prune_experts
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import UserError


@pytest.fixture
def model(encoder_decoder):  # noqa: F811
    return load_base(str(encoder_decoder("nllb_moe")))[0].eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    ids[2, 4:] = 1
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1), "use_cache": False}


def by_the_formula(layer, x_TD, *, scale):
    """sum_e G_e FFN_e(x) for a token at a time: softmax, the two largest, divided by their sum."""
    outputs = []
    for x in x_TD:
        gates = torch.softmax(layer.router.classifier(x), -1)
        first, second = gates.argsort(descending=True)[:2].tolist()
        total = gates[first] + gates[second]
        chosen = [(gates[e] / total) * layer.experts[f"expert_{e}"](x) for e in (first, second)]
        outputs.append(scale * (chosen[0] + chosen[1]))
    return torch.stack(outputs)


def test_every_layer_computes_the_formula_of_its_paper(model):
    torch.manual_seed(1)
    x = torch.randn(2, 9, 16)
    for side in (model.model.encoder, model.model.decoder):
        layer = side.layers[1].ffn
        expected = by_the_formula(layer, x.flatten(0, 1), scale=1 - model.config.moe_token_dropout)
        torch.testing.assert_close(layer(x).flatten(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_transformers_own_layer_is_still_wrong_and_is_mended_in_place(encoder_decoder, batch):  # noqa: F811
    stock = AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder("nllb_moe")).eval()
    layer, x = stock.model.encoder.layers[1].ffn, torch.randn(2, 9, 16)
    expected = by_the_formula(layer, x.flatten(0, 1), scale=0.8)
    # When this fails, transformers is right again, and `compute_as_published` is needed for training alone.
    assert (layer(x).flatten(0, 1) - expected).abs().max() > 1e-2
    names = {key: value.shape for key, value in stock.state_dict().items()}
    before = stock(**batch).logits
    compute_as_published(stock)
    assert (layer(x).flatten(0, 1) - expected).abs().max() < 1e-5
    assert {key: value.shape for key, value in stock.state_dict().items()} == names
    assert (stock(**batch).logits - before).abs().max() > 1e-3


def test_padding_is_given_to_no_expert_and_changes_nothing(model, batch):
    alone = {key: value[2:, :4] if torch.is_tensor(value) else value for key, value in batch.items()}
    alone["decoder_input_ids"] = batch["decoder_input_ids"][2:]
    torch.testing.assert_close(model(**batch).logits[2:], model(**alone).logits, rtol=1e-4, atol=1e-5)
    seen = []
    experts = model.model.encoder.layers[1].ffn.experts
    handle = experts.register_forward_pre_hook(lambda _module, args: seen.append(args[2].sum(-1)))
    model(**batch)
    handle.remove()
    torch.testing.assert_close(seen[0].view(3, 7), batch["attention_mask"].float())


def test_training_masks_whole_outputs_without_scaling_and_forgets_the_capacity_of_an_evaluation(model):
    layer = model.model.encoder.layers[1].ffn
    layer.eval()(torch.randn(1, 3, 16))
    x = torch.randn(1, 4000, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        layer.router.classifier.weight.zero_()  # every token takes experts 0 and 1, a half each
        y = layer.train()(x).squeeze(0)
        kept = 2 * -(-4000 // 4)
        halves = [0.5 * layer.experts[f"expert_{index}"](x.squeeze(0)) for index in (0, 1)]
    choices = torch.stack([torch.zeros_like(y), halves[0], halves[1], halves[0] + halves[1]])
    nearest = (y - choices).norm(dim=-1).min(0)
    assert nearest.values.max() < 1e-5
    within = nearest.indices[:kept]
    shares = torch.bincount(within, minlength=4).float() / kept
    torch.testing.assert_close(shares, torch.tensor([0.04, 0.16, 0.16, 0.64]), rtol=0, atol=0.03)


def test_equal_experts_compute_what_the_dense_model_does(encoder_decoder, model):  # noqa: F811
    sizes = {key: getattr(model.config, key) for key in M2M100Config().to_dict() if hasattr(model.config, key)}
    kept = {key: value for key, value in sizes.items() if key not in ("model_type", "architectures", "dtype")}
    dense = M2M100ForConditionalGeneration(M2M100Config(**kept)).eval()
    state = model.state_dict()
    names = {"ff_layer_norm": "final_layer_norm", "cross_attention": "encoder_attn", "ffn.": ""}
    for side in (model.model.encoder, model.model.decoder):
        experts = side.layers[1].ffn.experts
        for expert in (experts[f"expert_{index}"] for index in range(4)):
            expert.load_state_dict(experts["expert_0"].state_dict())
        experts.moe_token_dropout = 0.0
    state = {key.replace("ffn.experts.expert_0.", ""): value for key, value in model.state_dict().items()}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    own = {key: value for key, value in state.items() if key in dense.state_dict()}
    assert not dense.load_state_dict(own, strict=False).missing_keys
    ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
    torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_pruning_keeps_what_the_sentences_use_exactly(model, batch, tmp_path):
    used = {"input_ids": batch["input_ids"][:1, :2], "decoder_input_ids": batch["input_ids"][:1, :1]}
    with torch.no_grad():  # experts 1 and 3 win by far
        for side in (model.model.encoder, model.model.decoder):
            side.layers[1].ffn.router.classifier.weight[[0, 2]] *= 1e-3
            side.layers[1].ffn.router.classifier.weight[[1, 3]] = 1.0
    before = model(**used).logits
    pruned = prune_experts(model, [used], keep=3)
    assert [layer.layer for layer in pruned] == ["model.encoder.layers.1.ffn", "model.decoder.layers.1.ffn"]
    assert all(len(layer.kept) == 3 and layer.share == pytest.approx(1) for layer in pruned)
    torch.testing.assert_close(model(**used).logits, before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    compute_as_published(again)
    assert again.config.num_experts == 3
    torch.testing.assert_close(again(**used).logits, before, rtol=0, atol=1e-6)


def test_pruning_refuses_what_it_cannot_do(model, encoder_decoder):  # noqa: F811
    with pytest.raises(UserError, match="keep is 5: it must lie between 2 and the 4 experts there are"):
        prune_experts(model, [], keep=5)
    with pytest.raises(UserError, match="has no layers of NLLB-MoE"):
        prune_experts(load_base(str(encoder_decoder("nllb")))[0], [], keep=2)
