"""The tables of docs/evidence/, from what `drsl compare` and `drsl attack` wrote there.

Relies on nothing but the results; `readme` relies on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["comparison_table", "detection_table", "noise_table", "percent", "regularizer_table", "table_row"]

# Names of scores: of the logits of a linear layer, and of those of a Gaussian-mixture head.
_SCORES = {
    "softmax": ("largest softmax value", "largest softmax value"),
    "logsumexp": ("logsumexp (energy)", "log-likelihood, mixture"),
    "logit": ("largest logit", "log-likelihood, class"),
}
_STRANGERS = {"noise": "noise", "shuffled": "shuffled", "fashion_mnist": "Fashion-MNIST"}
_REGULARIZERS = {"weight_decay": "weight decay", "l1": "L1", "absum": "Absum"}


def comparison_table(folder: Path) -> str:
    """Clean and robust accuracy of one comparison, a line for each loss."""
    result = _read(folder)
    radii = [entry["eps"] for entry in result["summary"][0]["robust_accuracy"]]
    heads = ["trained with", "clean", *(f"eps {eps:g}" for eps in radii), "masking checks that warn"]
    lines = [table_row(heads), table_row(["---", *["---:"] * (len(radii) + 1), "---"])]
    for c in result["summary"]:
        found = [check for check in result["checks"] if (check["loss"], check["tau"]) == (c["loss"], c["tau"])]
        warned = [f"{check['name']} ({check['warns']})" for check in found if check["warns"]]
        told = ", ".join(warned) or ("none" if found else "not made")
        lines.append(table_row([_loss(c), percent(c["clean_accuracy"]), *map(percent, c["robust_accuracy"]), told]))
    return _with_notes(lines, [result["meaning"][key] for key in ("training", "accuracy", "robust")])


def detection_table(folders: Sequence[Path]) -> str:
    """How often each score tells normal images from abnormal ones: attacked at the radius of each folder, or strange.

    Images that are strange without an attack are the same in all folders.
    """
    results = [_read(folder) for folder in folders]
    radii = [f"{_attacked_at(result):g}" for result in results]
    heads = [f"{what}eps {eps}" for eps in radii for what in ("attacked, ", "score too, ")]
    lines = [table_row(["trained with", "score", *heads, *_STRANGERS.values()])]
    lines.append(table_row(["---", "---", *["---:"] * (len(heads) + len(_STRANGERS))]))
    for i, of_loss in enumerate(results[0]["summary"]):
        for j, of_score in enumerate(of_loss["detection"]):
            found = [result["summary"][i]["detection"][j] for result in results]
            figures = [each[attack] for each in found for attack in ("plain", "joint")]
            figures += [of_score["strangers"][kind] for kind in _STRANGERS]
            score = _SCORES[of_score["score"]][of_loss["loss"] == "gm"]
            lines.append(table_row([_loss(of_loss), score, *map(_area, figures)]))
    meaning = results[0]["meaning"]
    counted = meaning["accuracy"].replace("percent of", "ROC-AUC over")
    return _with_notes(lines, [meaning["training"], counted])


def noise_table(folders: Sequence[Path], of_run: Callable[[dict[str, Any]], float]) -> str:
    """A figure of each run, by loss and by the share of wrong labels, which is that of each folder."""
    results = [_read(folder) for folder in folders]
    shares = [100 * result["settings"]["training"]["recipe"]["label_noise"] for result in results]
    lines = [table_row(["trained with", *(f"{share:g} % wrong" for share in shares)])]
    lines.append(table_row(["---", *["---:"] * len(shares)]))
    for c in results[0]["summary"]:
        cells = []
        for result in results:
            runs = [run for run in result["runs"] if (run["loss"], run["tau"]) == (c["loss"], c["tau"])]
            cells.append(_over_seeds([of_run(run) for run in runs]))
        lines.append(table_row([_loss(c), *cells]))
    return "\n".join(lines) + "\n"


def regularizer_table(folder: Path) -> str:
    """What the wave and all attacks together leave of networks that were trained with a penalty on their weights."""
    result = _read(folder)
    radii = result["settings"]["epsilons"]
    kinds: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for checkpoint in result["checkpoints"]:
        kinds.setdefault(_regularizer(checkpoint["about"]["recipe"]), []).append(checkpoint)
    heads = ["clean", *(f"one wave, eps {eps:g}" for eps in radii), *(f"all attacks, eps {eps:g}" for eps in radii)]
    lines = [table_row(["regularizer", *heads, "masking checks that warn"])]
    lines.append(table_row(["---", *["---:"] * len(heads), "---"]))
    for (kind, weight), some in sorted(kinds.items()):
        figures = [[each["clean_accuracy"], *_of_waves(each), *_of_all(each)] for each in some]
        name = f"{list(_REGULARIZERS.values())[kind]} {weight:g}" if weight else "none"
        lines.append(table_row([name, *map(_over_seeds, zip(*figures, strict=True)), _warnings(some)]))
    meaning = result["meaning"]
    seeds = sorted({checkpoint["about"]["seed"] for checkpoint in result["checkpoints"]})
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "a single seed"
    notes = [_training(result["checkpoints"][0]["about"]), f"{meaning['accuracy']}, {over}", meaning["attack"]]
    return _with_notes(lines, [*notes, f"all attacks: {meaning['worst case']}"])


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(value: dict[str, float | None]) -> str:
    """A mean and its standard deviation, where it has one."""
    middle = f"{100 * value['mean']:.1f}"
    return middle if value["std"] is None else f"{middle} ± {100 * value['std']:.1f}"


def _read(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return result


def _loss(summary: dict[str, Any]) -> str:
    return f"{summary['loss']} tau={summary['tau']:g}" if summary["tau"] else str(summary["loss"])


def _with_notes(lines: Sequence[str], notes: Sequence[str]) -> str:
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _over_seeds(values: Sequence[float]) -> str:
    return percent({"mean": mean(values), "std": stdev(values) if len(values) > 1 else None})


def _attacked_at(result: dict[str, Any]) -> float:
    """The radius that detection looks at: the one nearest to 0.1."""
    return min(result["settings"]["epsilons"], key=lambda eps: abs(eps - 0.1))


def _area(value: dict[str, float] | None) -> str:
    """None where no attack broke an image."""
    return "none broken" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f}"


def _regularizer(recipe: dict[str, Any]) -> tuple[int, float]:
    """Which one, as an index, and its weight; a weight that is 0 may be absent."""
    used = [(kind, recipe[name]) for kind, name in enumerate(_REGULARIZERS) if recipe.get(name)]
    if len(used) > 1:
        raise SystemExit(f"one regularizer at most must have been used, got {recipe}")
    return used[0] if used else (-1, 0.0)


def _of_waves(checkpoint: dict[str, Any]) -> list[float]:
    return [found["accuracy"] for found in checkpoint["attacks"] if found["attack"] == "fourier"]


def _of_all(checkpoint: dict[str, Any]) -> list[float]:
    return [found["accuracy"] for found in checkpoint["worst_case"]]


def _warnings(checkpoints: Sequence[dict[str, Any]]) -> str:
    """The checks that warn, with the number of checkpoints of which they do."""
    checks = [{check["name"] for check in each["checks"] if check["outcome"] == "warning"} for each in checkpoints]
    counts = {name: sum(name in of_one for of_one in checks) for name in sorted(set().union(*checks))}
    none = "none" if any(each["checks"] for each in checkpoints) else "not made"
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or none


def _training(about: dict[str, Any]) -> str:
    """How all of them were trained, in words."""
    recipe, attack = about["recipe"], about["recipe"]["adversarial"]
    said = [f"{about['model']} on {about['dataset']}, {about['loss']['name']}"]
    said.append(f"{recipe['epochs']} epochs of {recipe['optimizer']} at {recipe['learning_rate']:g}")
    if attack is not None:
        said.append(f"adversarial training ({attack['method']}), {attack['steps']} steps within eps {attack['eps']:g}")
    return ", ".join(said) + "; the weights of the best epoch on images held out of training"
