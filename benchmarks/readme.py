"""Fill the tables of README.md and docs/ from the committed results: `python benchmarks/readme.py`.

With `--check` it compares only. A table stands between `<!-- NAME -->` and `<!-- end NAME -->`. Relies on `targets`,
`evidence_tables`, `linear`, `scale`, benchmarks/results/ and docs/evidence/; a test runs --check, so a number in a
table cannot differ from the result that it comes from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
from evidence_tables import comparison_table, detection_table, noise_table, regularizer_table
from evidence_tables import percent as _percent
from evidence_tables import table_row as _row
from linear import HEADS as LINEAR_HEADS
from linear import rows as linear_rows
from scale import tables as scale_tables
from targets import Target, targets

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EVIDENCE = ROOT / "docs" / "evidence"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is not up to date.")
def main(check: bool) -> None:
    """Write the tables of README.md and docs/ from the committed results."""
    readme = {"demo": demo_table(), "ratios": ratio_table(), "targets": target_table(), "loop": loop_table()}
    speed = {"kernels": kernel_table(), "prediction": prediction_table()}
    bottleneck = {"bottleneck": bottleneck_table(), "ranks": rank_table()}
    pages = {"README.md": readme, "docs/speed.md": speed, "docs/evidence/softmax_bottleneck.md": bottleneck}
    pages["docs/scale.md"] = scale_tables()
    pages["docs/attacking.md"] = {"scaled": scaled_table()}
    pages["docs/language_model_heads.md"] = {"linear": linear_table()}
    pages["docs/language_models.md"] = {"results": language_model_table()}
    for name, tables in (pages | evidence_pages()).items():
        path = ROOT / name
        old = path.read_text()
        new = filled(old, name, tables)
        if check and new != old:
            sys.exit(f"{name} differs from the results: run python benchmarks/readme.py")
        path.write_text(new)


def evidence_pages() -> dict[str, dict[str, str]]:
    """The tables of the pages that have a folder of results beside them."""
    standard = {folder.name: comparison_table(folder) for folder in _folders("fashion_mnist")}
    penalties = {folder.name: regularizer_table(folder) for folder in _folders("absum")}
    mixture = _folders("gaussian_mixture")
    found = {"detection": detection_table(mixture), "accuracy": comparison_table(mixture[0])}
    return {
        "docs/evidence/fashion_mnist.md": standard,
        "docs/evidence/absum.md": penalties,
        "docs/evidence/gaussian_mixture_detection.md": found,
        "docs/evidence/label_noise.md": noise_tables(),
    }


def noise_tables() -> dict[str, str]:
    """Accuracy of the best epoch, of the last, and under attack, for the folders DATASET-SHARE of each data set."""
    by_dataset: dict[str, list[Path]] = {}
    for folder in _folders("label_noise"):
        by_dataset.setdefault(folder.name.partition("-")[0], []).append(folder)
    tables = {"tau": comparison_table(by_dataset.pop("tau")[0])}
    for dataset, folders in by_dataset.items():
        tables[f"{dataset}_clean"] = noise_table(folders, lambda run: run["clean_accuracy"])
        tables[f"{dataset}_last"] = noise_table(folders, lambda run: run["epochs"][-1]["validation_accuracy"])
        tables[f"{dataset}_robust"] = noise_table(folders, lambda run: run["robust_accuracy"][0]["accuracy"])
    return tables


def _folders(page: str) -> list[Path]:
    return sorted(path for path in (EVIDENCE / page).iterdir() if path.is_dir())


def filled(text: str, where: str, tables: dict[str, str]) -> str:
    """The text of a page with every table made anew."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: match[1] + table + match[2], text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{where} must hold <!-- {name} --> and <!-- end {name} --> once, found {count}")
    return text


def demo_table() -> str:
    """Clean and robust accuracy of the bundled comparison."""
    result = json.loads((RESULTS / "demo" / "results.json").read_text())
    columns = result["summary"]
    heads = [c["loss"] if c["loss"] == "ce" else f"{c['loss']} tau={c['tau']:g}" for c in columns]
    lines = [_row(["trained with", *heads]), _row(["---", *["---:"] * len(heads)])]
    lines.append(_row(["clean", *[_percent(c["clean_accuracy"]) for c in columns]]))
    for i, entry in enumerate(columns[0]["robust_accuracy"]):
        lines.append(_row([f"robust, eps {entry['eps']:g}", *[_percent(c["robust_accuracy"][i]) for c in columns]]))
    lines.append(_row(["seconds per epoch", *[f"{c['seconds_per_epoch']:.4f}" for c in columns]]))
    lines.append(_row(["ratio to `F.cross_entropy`", *[f"{c['ratio_to_cross_entropy']:.2f}" for c in columns]]))
    return "\n".join(lines) + "\n"


def scaled_table() -> str:
    """What attacks leave of one network, by the factor on its logits."""
    result = json.loads((RESULTS / "scaled_logits.json").read_text())
    lines = [_row(["attacked through", *(f"x {factor}" for factor in result["factors"])])]
    lines.append(_row(["---", *["---:"] * len(result["factors"])]))
    lines += [_row([name, *(f"{100 * a:.1f}" for a in values)]) for name, values in result["robust_accuracy"].items()]
    attack = f"PGD with {result['steps']} steps and 2 random starts at eps {result['eps']:g}"
    return "\n".join(lines) + f"\n\nPercent of {result['images']} test images that survive {attack}.\n"


def linear_table() -> str:
    """Time and memory of output layer and loss, of every contender."""
    result = json.loads((RESULTS / "cpu_linear.json").read_text())
    lines = [_row(LINEAR_HEADS), _row(["---:", "---", *["---:"] * 4])]
    lines += [_row(row) for case in result["cases"] for row in linear_rows(case)]
    case, where = result["cases"][0], result["cases"][0]["where"]
    rounds = " and ".join(dict.fromkeys(str(one["rounds"]) for one in result["cases"]))
    commits = ", ".join(dict.fromkeys(one["where"]["commit"] for one in result["cases"]))
    notes = (
        f"{case['tokens']} tokens of width {case['width']}, {case['dtype']}, medians of {rounds} rounds in which\n"
        f"all take turns (the slowest in one). {where['processor']}, {case['threads']} threads, torch "
        f"{where['torch']}, {where['date'][:10]}, commits {commits}."
    )
    return "\n".join(lines) + f"\n\n{notes}\n"


def language_model_table() -> str:
    """Perplexity and right predictions of each loss: unattacked, and what the attacks left."""
    runs = json.loads((RESULTS / "language_models" / "results.json").read_text())["runs"]
    heads = [cell for run in runs for cell in (f"`{run['loss']}`: perplexity", "right, %")]
    places: list[tuple[str, list[dict[str, Any]]]] = [("the test part", runs)]
    names = {
        "embedding": ("attacked sequences", "vectors moved by"),
        "substitution": ("their second halves", "exchanged:"),
    }
    for kind, (before, name) in names.items():
        for points in zip(*(run[kind] for run in runs), strict=True):
            size = points[0]["size"]
            places.append((f"{name} {size:g}" if size else before, list(points)))
    lines = [_row(["", *heads]), _row(["---", *["---:"] * len(heads)])]
    for name, points in places:
        cells = (text for p in points for text in (f"{p['perplexity']:.4g}", f"{100 * p['accuracy']:.1f}"))
        lines.append(_row([name, *cells]))
    return "\n".join(lines) + "\n"


def bottleneck_table() -> str:
    """What each activation reached, and what it can reach at best."""
    result = json.loads((RESULTS / "bottleneck.json").read_text())
    models = list(result["rows"][0]["reached"])
    lines = [_row(["target", "entropy", *models]), _row(["---", "---:", *["---:"] * len(models)])]
    for row in result["rows"]:
        cells = []
        for model in models:
            known = row["known"].get(model)
            least = "" if known is None else f" (least: {known:.6g})"
            cells.append(_gap(row["reached"][model]) + least)
        lines.append(_row([row["target"], f"{row['entropy']:.4f}", *cells]))
    notes = (
        "Mean KL(P, Q) over the contexts, in nats: cross-entropy less the entropy of the targets, its floor. In\n"
        "brackets the least that is possible, where it is known (for mixtures of any number of softmaxes),"
        f" to {result['tolerance']:g}.\nBest of {result['restarts']} starts."
    )
    return (
        "\n".join(lines) + f"\n\n{notes}\ntorch {result['torch']}, {result['date'][:10]}, commit {result['commit']}.\n"
    )


def rank_table() -> str:
    """Ranks of learned logarithms of probabilities."""
    random = json.loads((RESULTS / "bottleneck.json").read_text())["random"]
    lines = [_row(["", "rank of log Q", "gap reached"]), _row(["---", "---:", "---:"])]
    lines += [_row([model, str(found["rank"]), _gap(found["gap"])]) for model, found in random["models"].items()]
    contexts, classes = random["shape"]
    lines.append(_row(["the target itself", str(random["rank"]), "0"]))
    return (
        "\n".join(lines) + f"\n\n{contexts} contexts, {classes} classes; singular values above 1e-6 of the largest.\n"
    )


def ratio_table() -> str:
    """Time over that of F.cross_entropy: forward + backward, and of ours the loss alone."""
    result = json.loads((RESULTS / "cpu_ratios.json").read_text())
    found = {(r["work"], r["dtype"], r["isa"], r["rows"], r["classes"]): _medians(r) for r in result["rows"]}
    others = {
        "`compiled F.cross_entropy`": "compiled F.cross_entropy",
        "DRSL, compiled": "compiled reference",
        "DRSL, eager": "reference",
        "`clone`": "clone",
    }
    heads = ["logits", "`F.cross_entropy`", "`uniform`", "`non_target_logits`", *others, "`uniform`, loss alone"]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for work, dtype, isa, n, classes in found:
        if (work, dtype, isa) != ("forward+backward", "float32", "best"):
            continue
        row, alone = found[work, dtype, isa, n, classes], found["no_grad", dtype, isa, n, classes]
        base = row["F.cross_entropy"]
        cells = [f"{row[name] / base:.2f}" if name in row else "" for name in ("uniform", "non_target_logits")]
        cells += [f"{row[name] / base:.2f}" if name in row else "" for name in others.values()]
        alone_ratio = f"{alone['uniform'] / alone['F.cross_entropy']:.2f}"
        lines.append(_row([f"{n}x{classes}", f"{base * 1e6:,.0f} us", *cells, alone_ratio]))
    where = f"{result['processor']}, {result['threads']} threads, torch {result['torch']}, {result['date'][:10]}"
    return "\n".join(lines) + f"\n\n{where}, commit {result['commit']}.\n"


def target_table() -> str:
    """Each speed target with what was measured."""
    result = json.loads((RESULTS / "cpu_ratios.json").read_text())
    kinds: dict[str, list[Target]] = {}
    for target in targets(result["rows"]):
        kinds.setdefault(target.what, []).append(target)
    lines = [
        _row(["`uniform`, time or memory", "measured, of what was allowed, by shape of the logits"]),
        _row(["---", "---"]),
    ]
    for what, some in kinds.items():
        lines.append(_row([what, "; ".join(map(_target, some))]))
    return "\n".join(lines) + "\n"


def loop_table() -> str:
    """An epoch of training and an attack over the same with F.cross_entropy."""
    result = json.loads((RESULTS / "cpu_loop.json").read_text())
    lines = [_row(["time of", "over that with `F.cross_entropy`"]), _row(["---", "---:"])]
    lines += [_row([what, f"{ratio:.2f}"]) for what, ratio in result["ratios"].items()]
    where = f"{result['processor']}, {result['threads']} threads, torch {result['torch']}, {result['date'][:10]}"
    return "\n".join(lines) + f"\n\n{where}, commit {result['commit']}.\n"


def kernel_table() -> str:
    """What today's CPU kernels take of what earlier ones took."""
    result = json.loads((RESULTS / "cpu_kernels.json").read_text())
    found = {(r["isa"], r["dtype"], r["work"], r["rows"], r["classes"]): r for r in result["rows"]}
    kinds = list(dict.fromkeys(key[:3] for key in found))
    names = [f"{isa.upper().replace('AVX512', 'AVX-512')} {dtype} {work}" for isa, dtype, work in kinds]
    lines = [_row(["logits", *names]), _row(["---", *["---:"] * len(names)])]
    for n, classes in dict.fromkeys(key[3:] for key in found):
        of_shape = [found[(*kind, n, classes)] for kind in kinds]
        lines.append(_row([f"{n}x{classes}", *(f"{r['after']:.2f} ({r['ratio']:.2f})" for r in of_shape)]))
    where = f"{result['processor']}, {result['threads']} threads, {result['date'][:10]}, commit {result['commit']}"
    return "\n".join(lines) + f"\n\nNanoseconds per logit and thread (ratio to commit {result['before']}); {where}.\n"


def prediction_table() -> str:
    """What the GPU kernels should take, from their machine code."""
    result = json.loads((RESULTS / "gpu_prediction.json").read_text())
    heads = ["logits", "dtype", "instructions", "KB in flight", "memory", "instructions issued", "exponentials"]
    lines = [_row([*heads, "prediction"]), _row(["---", "---", *["---:"] * (len(heads) - 1)])]
    for r in result["predictions"]:
        cells = [f"{r['rows']}x{r['classes']}", r["dtype"], f"{r['instructions_per_element']:.1f}"]
        cells += [f"{r['kilobytes_in_flight']:.0f}", *(f"{r[part]:.2f}" for part in ("memory", "issue", "mufu"))]
        lines.append(_row([*cells, f"{r['at_best']:.2f} to {r['at_worst']:.2f}"]))
    return (
        "\n".join(lines) + f"\n\nTriton {result['triton']}, sm_90, {result['date'][:10]}, commit {result['commit']}.\n"
    )


def _target(target: Target) -> str:
    rows, classes = target.shape
    return f"{rows}x{classes}: {target.text()} of {target.allowed:g}{'' if target.met else ' **missed**'}"


def _medians(row: dict[str, Any]) -> dict[str, float]:
    return {name: timing["median"] for name, timing in row["seconds"].items()}


def _gap(nats: float) -> str:
    """Below a hundred-thousandth it is up to the end of a training."""
    return f"{nats:.6f}" if nats >= 1e-5 else "below 1e-5"


if __name__ == "__main__":
    main()
