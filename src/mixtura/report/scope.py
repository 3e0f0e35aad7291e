"""What a comparison cannot tell, whatever its numbers."""

from mixtura.report.wording import NBSP, percent, quantity, yardstick_of
from mixtura.results import Results
from mixtura.results.conclusions import Budget, Limit

_LARGER = {
    "pretraining": "width, depth or number of experts",
    "translation": "width, depth, rank or number of experts",
    "classification": "base model, rank or number of experts",
    "chat": "base model, rank or number of experts",
}
_SETTINGS = {
    "pretraining": "the balance loss, the group size and the temperature",
    "translation": "the balance loss, the group size, the rank and the layers that are adapted",
    "classification": "the pooling, the rank and the layers that are adapted",
    "chat": "the balance loss, the rank and the layers that are adapted",
}
_USES = {
    "pretraining": "Held-out loss is not accuracy on a task, and no text was judged by a reader.",
    "translation": "Scores compare a translation with one reference by its characters and words; none was judged by a "
    "reader.",
    "classification": "Labels are taken as they are, right or wrong, and no prediction was judged by a reader.",
    "chat": "Answers are compared with one reference by its tokens and words; none was judged by a reader.",
}


def _searched(results: Results) -> str:
    records = [arm.searched for arm in results.arms.values()]
    scales = any(record is not None and record.best_scale is not None for record in records)
    return "learning rate and initialisation scale were" if scales else "the learning rate was"


def list_limits(results: Results, budget: Budget) -> list[Limit]:
    """What the comparison cannot tell, whatever its numbers."""
    environment, others, task = results.environment, len(results.arms) - 1, results.task
    processor = environment.get("processor") or "unnamed processor"
    varied = "data order" if yardstick_of(results).continued else "initialisation and data order"
    largest = quantity(max(arm.parameters_total for arm in results.arms.values()))
    limits = {
        "Longer training": f"Each run saw {quantity(budget.tokens)} tokens. The order of the arms can change with "
        "more, and a cosine schedule is tied to its length: a point on the way of a run is no finished shorter run.",
        "Larger models": f"The largest arm has {largest} parameters. Nothing here says that the order holds at another "
        f"{_LARGER[task]}.",
        "Other text": f"One source ({results.data.description}), one split. The intervals cover {varied}, "
        "not the choice of the held-out text, which is the same for all arms.",
        "Other settings": f"At most {_searched(results)} searched for each arm. Weight decay, warm-up, "
        f"{_SETTINGS[task]} are those of the recipe.",
        "Other hardware": f"Seconds and memory hold for this machine ({processor}, {environment['device']}) and these "
        "kernels; what mixtures cost beside dense layers differs between machines.",
        "Use of the model": _USES[task],
    }
    if others > 1 and budget.seeds > 1:
        limits["All intervals at once"] = (
            f"Each interval is a 95{NBSP}% interval of its own. With {others} arms beside the baseline, the chance "
            f"that at least one misses can be as high as about {percent(1 - 0.95**others, 0)}."
        )
    return [Limit(title, text) for title, text in limits.items()]
