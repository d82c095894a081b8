#!/usr/bin/env python3
"""Store the rows of values that finetuning changed in a file; apply them, or remove them again.

make     write the rows in which a finetuned checkpoint differs from its base
apply    add one or several deltas to the base
revert   remove deltas; this turns the output of apply into the exact bytes of the base
list     show what deltas contain
report   show which rows changed, which tokens read them, and whether old text needs them

A delta holds rows of value tables, and a hash of the base model. It works for models finetuned with
--memory-finetune. It contains neither heads of sentence tasks nor optimizer state.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

from _script import check_output, run

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pkm_fairseq import __version__
from pkm_fairseq.analysis.checkpoints import (
    count_tokens,
    first_tokens,
    mask,
    open_checkpoint,
    read_text,
    updates_of,
)
from pkm_fairseq.analysis.moved import check_rows, distances_by_table, what_moved
from pkm_fairseq.memory.archive import write_rows
from pkm_fairseq.memory.delta import (
    APART,
    TableRows,
    check_applied,
    check_base,
    combine,
    load_delta,
    make_delta,
    save_delta,
)
from pkm_fairseq.memory.files import write_file
from pkm_fairseq.memory.observe.slot_counts import load_counts
from pkm_fairseq.models.checkpoints import read_checkpoint

WIDTH = 120  # of tables, where there is no terminal


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("make", help="make a delta from two checkpoints")
    make.add_argument("base", type=Path, metavar="BASE", help="checkpoint before finetuning")
    make.add_argument(
        "finetuned", type=Path, metavar="FINETUNED", help="checkpoint after finetuning"
    )
    make.add_argument("--out", type=Path, required=True, metavar="DELTA")
    for command, help_text in (
        ("apply", "add deltas to their base"),
        ("revert", "remove deltas from a checkpoint; name all that it contains"),
    ):
        change = commands.add_parser(command, help=help_text)
        change.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
        change.add_argument("deltas", type=Path, nargs="+", metavar="DELTA")
        change.add_argument("--out", type=Path, required=True, metavar="FILE")
        change.add_argument(
            "--sum",
            action="store_true",
            help="if several deltas change the same row, add up their changes (default: refuse)",
        )
    listing = commands.add_parser("list", help="show what deltas contain")
    listing.add_argument("deltas", type=Path, nargs="+", metavar="DELTA")
    _add_report(
        commands.add_parser("report", help="show which rows changed, and which tokens read them")
    )
    return parser.parse_args()


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("delta", type=Path, metavar="DELTA")
    report.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FINETUNED",
        help="checkpoint that holds the delta's rows",
    )
    source = report.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DATA-BIN", help="text to read, such as the new one")
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, one passage per line")
    report.add_argument("--split", default="train", help="split of --data (default: %(default)s)")
    report.add_argument(
        "--sentencepiece-model", "--spm", metavar="FILE", help="tokenizer of --text"
    )
    report.add_argument("--dict", metavar="FILE", help="dictionary of --text")
    report.add_argument(
        "--background",
        type=Path,
        metavar="FILE",
        help="slot counts of old text, a file of memory_usage.py --save-counts: shows whether old "
        "text needs the changed rows",
    )
    report.add_argument(
        "--tokens",
        type=int,
        default=20_000,
        metavar="N",
        help="tokens to read (default: %(default)s)",
    )
    report.add_argument(
        "--hot", type=int, default=10, metavar="N", help="slots to show (default: %(default)s)"
    )
    report.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")


def main() -> None:
    """Run the command."""
    args = parse()
    for name in ("out", "json"):
        check_output(f"--{name}", getattr(args, name, None))
    commands: Dict[str, Callable[[argparse.Namespace], None]] = {
        "make": make,
        "apply": change,
        "revert": change,
        "list": show,
        "report": report,
    }
    commands[args.command](args)


def make(args: argparse.Namespace) -> None:
    """Make a delta."""
    base = read_checkpoint(str(args.base), "BASE", needs_tables=True)
    finetuned = read_checkpoint(str(args.finetuned), "FINETUNED", needs_tables=True)
    about = {
        "base": str(args.base),
        "finetuned": str(args.finetuned),
        "updates": updates_of(finetuned),
        "pkm_fairseq": __version__,
    }
    delta = make_delta(base["model"], finetuned["model"], about)
    heads = {name for name in finetuned["model"] if APART.search(name) and ".reads." not in name}
    if heads:
        print(f"{len(heads)} tensors of classification heads are left out")
    save_delta(args.out, delta)
    print(f"{args.out}: {described(delta.tables)}, {args.out.stat().st_size:,} bytes")


def change(args: argparse.Namespace) -> None:
    """Apply deltas, or revert them."""
    deltas = [load_delta(file) for file in args.deltas]
    rows = combine(deltas, args.sum)
    state = read_checkpoint(str(args.checkpoint), "CHECKPOINT", needs_tables=True)["model"]
    try:
        if args.command == "apply":
            check_base(state, deltas[0].base)
            written = {name: (table.slots, table.after) for name, table in rows.items()}
        else:
            check_applied(state, rows, deltas[0].base)
            written = {name: (table.slots, table.before) for name, table in rows.items()}
    except ValueError as error:
        raise ValueError(f"CHECKPOINT {args.checkpoint}: {error}") from None
    changed = described(rows)
    write_rows(args.checkpoint, args.out, "model", written)
    print(f"{args.out}: {changed} written")


def described(rows: Mapping[str, TableRows]) -> str:
    """The number of changed slots, by the layers that read them, in words."""
    return "; ".join(
        f"layer{'s' * (len(layers) > 1)} {named(layers)}: {len(moved):,} rows"
        for layers, moved in distances_by_table(rows).items()
    )


def named(layers: Sequence[int]) -> str:
    """Layers that share a table."""
    return ", ".join(map(str, layers))


def show(args: argparse.Namespace) -> None:
    """List deltas."""
    table = Table(title="deltas")
    for title in ("file", "bytes", "base", "layer", "rows", "norm of the change", "made of"):
        table.add_column(title, overflow="fold", justify="left" if title == "file" else "right")
    for file in args.deltas:
        delta = load_delta(file)
        for layers, moved in distances_by_table(delta.tables).items():
            norm = sum(distance**2 for distance in moved.values()) ** 0.5
            cells = [str(file), f"{file.stat().st_size:,}", delta.base[:12], named(layers)]
            cells += [f"{len(moved):,}", f"{norm:.4g}", str(delta.about.get("finetuned"))]
            table.add_row(*cells)
    _console().print(table)


def report(args: argparse.Namespace) -> None:
    """Print which rows changed."""
    for name in ("tokens", "hot"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, must be at least 1")
    delta, background = load_delta(args.delta), None
    if args.background is not None:
        background = load_counts(args.background, f"--background {args.background}")
    opened = open_checkpoint("finetuned", args.checkpoint, args)
    check_rows(opened, delta.tables)
    text = read_text(args, opened.dictionary, opened.model.max_positions())
    sequences = mask(opened, first_tokens(text, args.tokens))
    if not sequences:
        raise ValueError(f"{args.data or args.text} holds no token")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=2 * count_tokens(sequences))
        layers = what_moved(
            opened, delta.tables, sequences, background, args.hot,
            lambda done: progress.advance(task, done),
        )  # fmt: skip
    if args.json:
        write_file(args.json, json.dumps({"layers": layers}, indent=2, allow_nan=False) + "\n")
    for layer in layers:
        print_layer(layer)


def print_layer(layer: Dict[str, Any]) -> None:
    """Print which rows of a layer changed."""
    print(
        f"layer {layer['layer']}: {layer['rows_moved']:,} of {layer['n_slots']:,} rows moved, "
        f"norm of the change {layer['change_norm']:.4g}, farthest {layer['change_max']:.4g}"
    )
    old = layer["overlap"]
    if old is not None:
        print(
            f"  90 % of the old text's reads are of {old['needed']:,} slots; "
            f"{old['moved_and_needed']:,} of these moved, {old['expected']:,.0f} would by chance; "
            f"moved slots take {100 * old['old_reads']:.1f} % of its reads"
        )
    table = Table(title=f"layer {layer['layer']}: the slots that moved farthest")
    for title in ("slot", "change", "x uniform", "read by"):
        table.add_column(title, overflow="fold", justify="left" if title == "read by" else "right")
    for slot in layer["slots"]:
        readers: List[str] = [reader["token"] for reader in slot["readers"]]
        cells = [str(slot["slot"]), f"{slot['change']:.3g}", f"{slot['times_uniform']:.2g}"]
        table.add_row(*cells, " ".join(readers))
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


if __name__ == "__main__":
    run(main, hint="")
