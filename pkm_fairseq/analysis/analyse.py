"""The whole analysis: from checkpoints, text and logs to a report as JSON, tables and a page."""

import platform
from argparse import Namespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import __version__
from ..memory.observe.slot_counts import CountsFile
from ..memory.observe.usage import DRAWS
from .checkpoints import (
    Opened,
    count_tokens,
    first_tokens,
    mask,
    named_files,
    open_checkpoint,
    read_text,
    why_not_one_training,
)
from .curves import Log, last_counts, read_log
from .drift import drift_of_models
from .examine import count_slots, examine, tokens_for

COUNTS_BATCH = 16  # sequences per batch of saved counts; our choice

Begin = Callable[[str, int], Callable[[int], None]]  # a step's name and size -> its advance


class Analysis(NamedTuple):
    """The results of an analysis.

    Attributes:
        report: ready for JSON.
        masses: for each checkpoint, by layer, the weight of each slot, (n_slots,).
        logs: logs of trainings.
        counts: slot counts to save; None if not requested.
    """

    report: Dict[str, Any]
    masses: List[Dict[int, Tensor]]
    logs: List[Log]
    counts: Optional[CountsFile]


def analyse(args: Namespace, begin: Begin, warn: Callable[[str], None]) -> Analysis:
    """Analyse all checkpoints and logs of the command line.

    Args:
        args: ``checkpoint`` and ``log``, lists of ``[NAME=]FILE``; ``data`` or ``text`` with its
            options; ``draws`` per slot or ``tokens`` (None for both: 100 draws),
            ``unmasked``, ``hot``, ``probe``, ``save_counts``, ``counts_batch``.
        begin: called with each step's name and number of tokens; returns a function to call with
            the number of finished tokens.
        warn: called with each warning, one line.

    Raises:
        ValueError: an option or a file is wrong; the message names it.
    """
    notes: List[str] = []

    def note(text: str) -> None:
        notes.append(text)
        warn(text)

    logs = [read_log(name, file) for name, file in named_files(args.log)]
    for log in logs:
        if log.truncated:
            note(f"{log.file}: skipped the last line, which is incomplete")
    reports, masses, drifts, counts = _checkpoints(args, begin, note)
    report = {
        "text": args.data or args.text,
        "split": args.split if args.data else None,
        "notes": notes,
        "checkpoints": reports,
        "drift": drifts,
        "logs": [
            {"name": log.name, "file": str(log.file), "header": log.header,
             "last": last_counts(log)}
            for log in logs
        ],
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "pkm_fairseq": __version__,
        },
    }  # fmt: skip
    return Analysis(report, masses, logs, counts)


def _checkpoints(
    args: Namespace, begin: Begin, note: Callable[[str], None]
) -> Tuple[
    List[Dict[str, Any]], List[Dict[int, Tensor]], List[Dict[str, Any]], Optional[CountsFile]
]:
    """Examine the checkpoints one by one; at most two models are in memory."""
    reports, masses, drifts, counts = [], [], [], None
    previous: Optional[Opened] = None
    for name, file in named_files(args.checkpoint):
        opened = open_checkpoint(name, file, args)
        if previous is not None:
            try:
                drifts.append(_drift(args, previous, opened))
            except ValueError as error:  # arms of different shapes are still shown side by side
                note(f"no drift from {previous.name} to {opened.name}: {error}")
        previous = None  # frees it
        sequences = _text_for(args, opened, note)
        advance = begin(name, (3 if args.save_counts else 2) * count_tokens(sequences))
        examined = examine(opened, sequences, args.hot, advance)
        is_masked = opened.masking is not None and not args.unmasked
        reports.append({**examined.report, "masked": is_masked})
        masses.append(examined.mass)
        if args.save_counts:
            counts = count_slots(opened, sequences, args.counts_batch, advance)
            counts.about.update(_about(args, opened, is_masked))
        previous = opened
    _note_unequal_draws(reports, note)
    return reports, masses, drifts, counts


def _about(args: Namespace, opened: Opened, is_masked: bool) -> Dict[str, Any]:
    """The checkpoint and the text of the counts."""
    return {
        "checkpoint": str(opened.file),
        "updates": opened.updates,
        "origins": opened.origins,
        "text": args.data or args.text,
        "split": args.split if args.data else None,
        "masked": is_masked,
        "pkm_fairseq": __version__,
    }


def _note_unequal_draws(reports: Sequence[Dict[str, Any]], note: Callable[[str], None]) -> None:
    """Warn if the counts of the checkpoints have different numbers of draws."""
    draws = {
        f"{report['name']}, layer {layer['layer']}": layer["draws_per_slot"]
        for report in reports
        for layer in report["layers"]
    }
    if draws and min(draws.values()) < 0.99 * max(draws.values()):
        counted = "; ".join(f"{name}: {number:.3g}" for name, number in draws.items())
        note(
            f"the counts have different draws per slot ({counted}): compare usages on the curve, "
            f"at {min(draws.values()):.3g} draws per slot or fewer"
        )


def _text_for(args: Namespace, opened: Opened, note: Callable[[str], None]) -> List[Tensor]:
    """The tokens to read; warns if there are too few."""
    wanted = args.tokens or tokens_for(opened, args.draws or DRAWS)
    source = args.data or args.text
    length = opened.model.max_positions()
    sequences = first_tokens(read_text(args, opened.dictionary, length), wanted)
    if not args.unmasked:
        sequences = mask(opened, sequences)
    n_tokens = count_tokens(sequences)
    if not n_tokens:
        raise ValueError(f"{source} holds no token")
    if n_tokens < wanted:
        for config, layers in _configs(opened).items():
            draws = [n * config.heads / config.n_slots for n in (n_tokens, wanted)]
            note(
                f"{opened.name}: {source} has only {n_tokens:,} of the {wanted:,} tokens wanted: "
                f"{draws[0]:.3g} draws per slot instead of {draws[1]:.3g} "
                f"in layer {', '.join(map(str, layers))}"
            )
    return sequences


def _configs(opened: Opened) -> Dict[Any, List[int]]:
    """Layers by the settings of their memory."""
    configs: Dict[Any, List[int]] = {}
    for index, layer in opened.model.memory_layers().items():
        configs.setdefault(layer.memory.config, []).append(index)
    return configs


def _drift(args: Namespace, before: Opened, after: Opened) -> Dict[str, Any]:
    """Drift over the first tokens of the text, cut into the same sequences for both.

    Raises:
        ValueError: the checkpoints cannot be compared, or are not of one training.
    """
    reason = why_not_one_training(before, after)
    if reason and not args.force_drift:
        raise ValueError(f"{reason} (--force-drift compares them anyway)")
    length = min(opened.model.max_positions() for opened in (before, after))
    if before.dictionary.symbols != after.dictionary.symbols:
        raise ValueError(
            f"{before.name} and {after.name} were trained with different dictionaries: "
            "they cannot read the same tokens"
        )
    probe = first_tokens(read_text(args, before.dictionary, length), args.probe)
    layers = drift_of_models(before.model, after.model, probe, before.dictionary.pad(), args.probe)
    return {"before": before.name, "after": after.name, "layers": layers}


def check_options(args: Namespace) -> None:
    """Refuse options that are impossible or have no effect.

    Raises:
        ValueError: one line that names the option.
    """
    source, has_text = args.data or args.text, bool(args.checkpoint)
    if not args.checkpoint and not args.log:
        raise ValueError(
            "nothing to analyse: give a --checkpoint with --data or --text, or a --log"
        )
    if has_text and not source:
        raise ValueError("--checkpoint needs a text to read: --data or --text")
    if args.draws and args.tokens:
        raise ValueError("--draws and --tokens both set how much to read: give one of them")
    for option in ("draws", "tokens", "hot", "probe", "counts_batch"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}, must be at least 1")
    if args.save_counts and len(args.checkpoint) != 1:
        raise ValueError(
            f"--save-counts {args.save_counts} needs one --checkpoint, not {len(args.checkpoint)}"
        )
    _check_effects(args, has_text)
    args.split = args.split or "valid"
    args.hot = args.hot or 20
    args.probe = args.probe or 1000
    args.counts_batch = args.counts_batch or COUNTS_BATCH


def _check_effects(args: Namespace, has_text: bool) -> None:
    needs: Sequence[Tuple[str, Any, bool, str]] = (
        ("--data", args.data, has_text, "--checkpoint"),
        ("--text", args.text, has_text, "--checkpoint"),
        ("--unmasked", args.unmasked or None, has_text, "--checkpoint"),
        ("--draws", args.draws, has_text, "--checkpoint"),
        ("--tokens", args.tokens, has_text, "--checkpoint"),
        ("--hot", args.hot, has_text, "--checkpoint"),
        (
            "--force-drift",
            args.force_drift or None,
            len(args.checkpoint) > 1,
            "two or more checkpoints",
        ),
        ("--probe", args.probe, len(args.checkpoint) > 1, "two or more checkpoints"),
        ("--split", args.split, bool(args.data), "--data"),
        ("--counts-batch", args.counts_batch, bool(args.save_counts), "--save-counts"),
        ("--spm", args.sentencepiece_model, bool(args.text), "--text"),
        ("--dict", args.dict, bool(args.text), "--text"),
    )
    for option, value, is_possible, other in needs:
        if value is not None and not is_possible:
            raise ValueError(f"{option} has no effect without {other}")
