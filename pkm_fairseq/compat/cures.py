"""A table of all changes to fairseq or its environment, with reasons.

Each cure has a test that shows it. If our own classes can override a behaviour, it needs no cure.
"""

import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

from . import (
    averages,
    checkpoints,
    commands,
    environment,
    literals,
    loading,
    names,
    nan_detector,
    parts,
    precision,
    processes,
    quantization,
    registries,
    requirements,
    validation,
    values_file,
    whole_words,
    workers,
)

FAIRSEQ = "0.12.3"  # ve-fairseq 0.12.3 and fairseq-fixed 0.12.3.1, whose text code is identical
TESTS = "tests/unit/test_compat.py::"
OPTIONS = "tests/integration/test_options.py::"
PARTS = "tests/integration/test_parts.py::"
PRECISION = "tests/unit/test_mixed_precision.py::"


@dataclass(frozen=True)
class Cure:
    """A change to fairseq.

    Attributes:
        target: the full name of the object that does not work.
        reason: what happens without the cure.
        needed_on: the versions that have the problem.
        test: the test that shows it, by its pytest name.
        replace: takes the object under the name, and returns its replacement.
        prepare: or, if the target itself stays, a function that changes something else.
    """

    target: str
    reason: str
    needed_on: str
    test: str
    replace: Optional[Callable[[Any], Any]] = None
    prepare: Optional[Callable[[], None]] = None


CURES: Tuple[Cure, ...] = (
    Cure(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "a model is not told the folder of its checkpoint, in which its values file lies",
        FAIRSEQ,
        "tests/integration/test_mapped.py::test_fairseq_validate_reads_an_exported_model",
        replace=values_file.find_values_beside,
    ),
    Cure(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "a model is not told the folder of its checkpoint, in which the folder of its values lies",
        FAIRSEQ,
        PARTS + "test_parts_resume_to_the_bit_and_merge_to_the_whole_checkpoint",
        replace=parts.find_parts_beside,
    ),
    Cure(
        "fairseq.checkpoint_utils.save_checkpoint",
        "it removes old checkpoints, but not the folders of values to which only they refer",
        FAIRSEQ,
        PARTS + "test_folders_are_removed_with_the_last_checkpoint_that_needs_them",
        replace=parts.remove_parts_with_checkpoints,
    ),
    Cure(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu",
        "torch loads with weights_only and refuses argparse.Namespace, in which fairseq stores "
        "options, and omegaconf's containers, which workers send each other",
        f"{FAIRSEQ} with torch >= 2.6",
        TESTS + "test_checkpoints_of_fairseq_load_safely",
        prepare=environment.allow_plain_data,
    ),
    Cure(
        "fairseq.utils.eval_str_dict",
        "options that are written in Python are run (eval), such as encoder_xformers_att_config "
        "of any attention, also if they come from a checkpoint",
        FAIRSEQ,
        TESTS + "test_options_are_read_as_literals_and_not_run",
        prepare=literals.evaluate_literals_only,
    ),
    Cure(
        "fairseq.checkpoint_utils._upgrade_state_dict",
        "an old checkpoint whose architecture, task or criterion is registered nowhere is a "
        "KeyError, also for a training that starts from it and needs none of these",
        FAIRSEQ,
        TESTS + "test_a_training_starts_from_a_checkpoint_of_unknown_names",
        replace=names.keep_unknown_options,
    ),
    Cure(
        "fairseq.data.token_block_dataset.TokenBlockDataset",
        "--sample-break-mode eos takes np.compat.long, which was int and is gone",
        f"{FAIRSEQ} with numpy >= 2.0",
        TESTS + "test_sentences_are_cut_at_their_ends",
        prepare=environment.restore_numpy_compat,
    ),
    Cure(
        "fairseq.checkpoint_utils.torch_persistent_save",
        "when writing fails it writes twice more behind what it has written, and ends in a page of "
        "traceback; it does not wait for the disk",
        FAIRSEQ,
        TESTS + "test_on_a_full_disk_the_checkpoint_before_stays",
        replace=checkpoints.save_whole_files,
    ),
    Cure(
        "fairseq.checkpoint_utils.save_checkpoint",
        "it does not remove a worker's temporary file of a save that was killed, and the next save "
        "may need its disk space",
        FAIRSEQ,
        TESTS + "test_what_a_killed_save_left_is_removed_before_the_next",
        replace=checkpoints.remove_leftovers_first,
    ),
    Cure(
        "fairseq.file_io.PathManager.copy",
        "it copies a checkpoint to its other names in place: a kill leaves half of the file that "
        "the training is to go on from",
        FAIRSEQ,
        TESTS + "test_a_checkpoint_gets_its_name_when_it_is_whole_and_on_the_disk",
        replace=checkpoints.copy_whole_files,
    ),
    Cure(
        "fairseq.optim.amp_optimizer.AMPOptimizer.build_optimizer",
        "it knows of no optimizer's own wrapper, and trains on the CPU in full precision silently",
        FAIRSEQ,
        PRECISION + "test_amp_warns_on_the_cpu",
        replace=precision.ask_the_optimizer,
    ),
    Cure(
        "fairseq.optim.fp16_optimizer.FP16Optimizer.build_optimizer",
        "it flattens all parameters, among them the tables, whatever the optimizer",
        FAIRSEQ,
        PRECISION + "test_values_move_as_in_full_precision",
        replace=precision.ask_the_optimizer,
    ),
    Cure(
        "fairseq.optim.fp16_optimizer.MemoryEfficientFP16Optimizer.build_optimizer",
        "it knows of no optimizer's own wrapper",
        FAIRSEQ,
        PRECISION + "test_values_move_as_in_full_precision",
        replace=precision.ask_the_optimizer,
    ),
    Cure(
        "fairseq.optim.amp_optimizer.AMPOptimizer.clip_grad_norm",
        "a step whose norm is not finite is skipped in the log only",
        FAIRSEQ,
        PRECISION + "test_amp_skips_a_step_that_is_not_finite",
        replace=precision.skip_infinite_steps,
    ),
    Cure(
        "fairseq.optim.amp_optimizer.AMPOptimizer.step",
        "torch's scaler divides the same gradients by the loss scale a second time",
        FAIRSEQ,
        PRECISION + "test_amp_divides_by_the_loss_scale_once",
        replace=precision.step_what_was_unscaled,
    ),
    Cure(
        "fairseq.dataclass.utils.override_module_args",
        "--bpe bytes and --bpe characters end with: Could not find 'bpe/characters'",
        FAIRSEQ,
        TESTS + "test_whole_words_need_to_know_where_words_begin",
        replace=registries.give_each_name_a_configuration,
    ),
    Cure(
        "fairseq.dataclass.utils.override_module_args",
        "--write-checkpoints-asynchronously without iopath trains nothing and ends with status 0; "
        "--profile, --use-plasma-view and --optimizer composite end in tracebacks",
        FAIRSEQ,
        OPTIONS + "test_it_is_refused_in_one_line",
        replace=requirements.refuse_what_cannot_work,
    ),
    Cure(
        "fairseq.checkpoint_utils.load_ema_from_checkpoint",
        "--ema-seed-model with a checkpoint that holds no average ends with: KeyError: 'ema'",
        FAIRSEQ,
        OPTIONS + "test_it_is_refused_in_one_line",
        replace=requirements.name_a_checkpoint_without_average,
    ),
    Cure(
        "fairseq.tasks.masked_lm.MaskedLMTask.load_dataset",
        "--mask-whole-words ends with: the task has no attribute 'args'",
        FAIRSEQ,
        TESTS + "test_whole_words_are_masked",
        replace=whole_words.mask_words_of_the_bpe,
    ),
    Cure(
        "fairseq.modules.quantization.scalar.utils.get_layers",
        "--quant-noise-scalar ends with KeyError: LearnedPositionalEmbedding",
        FAIRSEQ,
        TESTS + "test_scalar_noise_leaves_positions_alone",
        replace=quantization.leave_subclasses_as_they_are,
    ),
    Cure(
        "fairseq.modules.quantization.scalar.ops.emulate_int8_histogram",
        "--quant-noise-scalar on the CPU ends with: Torch not compiled with CUDA enabled",
        FAIRSEQ,
        TESTS + "test_scalar_noise_is_drawn_on_the_cpu",
        replace=quantization.observe_on_any_device,
    ),
    Cure(
        "fairseq.nan_detector.NanDetector.add_hooks",
        "where a gradient is not finite, the search for its origin ends with StopIteration",
        f"{FAIRSEQ} with torch >= 2.0",
        TESTS + "test_the_search_for_the_first_nan_finds_it",
        replace=nan_detector.watch_all_outputs,
    ),
    Cure(
        "fairseq.nan_detector.NanDetector.__exit__",
        "an error in that search is shown in place of: gradients are Nan/Inf",
        FAIRSEQ,
        TESTS + "test_an_error_of_the_search_does_not_hide_the_first_one",
        replace=nan_detector.keep_the_first_error,
    ),
    Cure(
        "fairseq.models.ema.ema.EMA._step_internal",
        "--store-ema averages a parameter once for each of its names: three layers that share "
        "their values take 0.271 of an update at decay 0.9",
        FAIRSEQ,
        TESTS + "test_the_average_of_tied_parameters_is_that_of_any_other",
        replace=averages.average_tied_parameters_once,
    ),
    Cure(
        "fairseq.trainer.Trainer.load_checkpoint",
        "--store-ema with a checkpoint that has no average: KeyError: 'model'",
        FAIRSEQ,
        OPTIONS + "test_an_average_starts_from_a_checkpoint_without_one",
        replace=averages.start_from_the_checkpoint,
    ),
    Cure(
        "fairseq.trainer.Trainer.load_checkpoint",
        "a resumed or finetuned training takes a checkpoint of another dictionary of equal size, "
        "of labels in another order, or of options that change the output but no shape",
        FAIRSEQ,
        "tests/integration/test_options.py::test_a_checkpoint_of_another_training_is_refused",
        replace=loading.compare_with_the_checkpoint,
    ),
    Cure(
        "fairseq.models.distributed_fairseq_model.DistributedDataParallel",
        "--ddp-backend pytorch_ddp names a GPU for every model, which torch refuses on the CPU",
        FAIRSEQ,
        TESTS + "test_pytorch_ddp_wraps_a_model_on_the_cpu",
        replace=workers.wrap_without_devices,
    ),
    Cure(
        "fairseq.distributed.utils.call_main",
        "with --cpu it starts no workers and ends with status 0, or divides by zero GPUs",
        FAIRSEQ,
        "tests/integration/test_workers.py::test_fairseq_starts_workers_on_the_cpu",
        replace=workers.start_workers_on_the_cpu,
    ),
    Cure(
        "fairseq_cli.train.cli_main",
        "every mistake of a user ends a command in a traceback",
        FAIRSEQ,
        "tests/integration/test_bad_input.py::test_a_wrong_option_is_named_in_one_line",
        prepare=commands.end_in_one_line,
    ),
    Cure(
        "fairseq.distributed.utils.call_main",
        "a mistake that a spawned worker finds ends the command in two tracebacks",
        FAIRSEQ,
        "tests/integration/test_bad_input.py::test_workers_end_with_the_same_line",
        replace=commands.hand_over_lines,
    ),
    Cure(
        "hydra.core.utils.JobReturn.return_value",
        "every mistake of a user ends fairseq-hydra-train in a traceback",
        f"{FAIRSEQ} with hydra 1.3",
        "tests/integration/test_hydra.py::test_a_job_that_is_refused_ends_the_sweep",
        replace=commands.end_jobs_in_one_line,
    ),
    Cure(
        "fairseq.data.iterators.BackgroundConsumer",
        "its thread outlives a training that stops within an epoch; a process that ends meanwhile "
        "aborts with status 134",
        FAIRSEQ,
        TESTS + "test_threads_that_prepare_batches_end",
        prepare=processes.end_prefetching_at_exit,
    ),
    Cure(
        "fairseq.tasks.fairseq_task.FairseqTask.get_batch_iterator",
        "the last examples of a validation set are left out silently: the last batch, if it is no "
        "multiple of --required-batch-size-multiple",
        FAIRSEQ,
        TESTS + "test_what_is_left_out_of_a_validation_is_told",
        replace=validation.tell_what_is_left_out,
    ),
)

STOCK: Dict[Cure, Any] = {}  # the original object at each cure's target


def apply() -> None:
    """Apply all cures; a second call does nothing."""
    for cure in CURES:
        if cure not in STOCK:
            owner, name = find(cure.target)
            stock = inspect.getattr_static(owner, name)
            if cure.prepare is not None:
                cure.prepare()
            if cure.replace is not None:
                setattr(owner, name, cure.replace(stock))
            STOCK[cure] = stock


def find(target: str) -> Tuple[Any, str]:
    """The module or class that holds a target, and the target's name there."""
    owner, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner), name
