"""Every option of fairseq's trainer, roberta and our tasks: it works, or is refused in one line.

What an option does is tested elsewhere. Here each is used once beside memories, most several at a
time, in a training of three updates.
"""

import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Dict, List, Optional, Set, Tuple

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary

from tests.helpers import small_dictionary, write_split

from .conftest import Shared
from .runs import BIN, MASKED_LM, MEMORY, MODEL, TRAIN, USER_DIR, Run, free_port, run_alike
from .test_bad_input import last_line

ARCH = ["--arch", "resm_roberta_tiny", "--max-update", "3"]
SENTENCES = [
    *("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"),
    *("--num-classes", "2", "--init-token", "0", "--max-positions", "32"),
]
POLYNOMIAL = "--lr-scheduler polynomial_decay --total-num-update 3 "
START = "{start}/checkpoint_last.pt"
PARTS = (
    "--pipeline-encoder-balance [1] --pipeline-encoder-devices [1] --pipeline-decoder-balance [1] "
)

MASKED_LM_WORKS = [
    # logs, seeds
    "--no-progress-bar --log-interval 2 --log-format simple --log-file x.log --seed 3 "
    "--tensorboard-logdir tb --aim-repo aim --aim-run-hash x --wandb-project w --azureml-logging "
    "--empty-cache-freq 2 --all-gather-list-size 20000 --reset-logging --suppress-crashes",
    # data and validation
    "--num-workers 1 --skip-invalid-size-inputs-valid-test --max-tokens 128 "
    "--required-batch-size-multiple 1 --required-seq-len-multiple 4 --data-buffer-size 2 "
    "--train-subset valid --valid-subset valid --combine-valid-subsets --plasma-path p "
    "--fixed-validation-seed 3 --max-tokens-valid 64 --log-format tqdm",
    "--validate-interval 2 --validate-interval-updates 1 --validate-after-updates 2 "
    "--valid-subset test --ignore-unused-valid-subsets --batch-size-valid 4 --max-valid-steps 1 "
    "--curriculum 1 --gen-subset test --grouped-shuffling --update-epoch-batch-itr True "
    "--update-ordered-indices-seed",
    "--num-shards 2 --shard-id 1 --disable-validation --no-save --log-format none",
    # masking
    "--tokens-per-sample 16 --mask-prob 0.3 --leave-unmasked-prob 0.2 --random-token-prob 0.2 "
    "--freq-weighted-replacement --mask-multiple-length 2 --mask-stdev 0.5 --include-index "
    "--include-target-tokens",
    "--skip-masking --shorten-method random_crop --shorten-data-split-list train "
    "--pad 1 --eos 2 --unk 3",
    "--shorten-method truncate --bpe bert",
    # workers
    "--distributed-rank 0 --distributed-backend gloo --device-id 1 --bucket-cap-mb 1 "
    "--fix-batches-to-gpus --find-unused-parameters --gradient-as-bucket-view --fast-stat-sync "
    "--heartbeat-timeout 60 --broadcast-buffers --slowmo-momentum 0.1 --slowmo-base-algorithm sgp "
    "--localsgd-frequency 2 --nprocs-per-node 2 --ddp-comm-hook fp16 --distributed-port 14333",
    PARTS + "--pipeline-balance [1,1] --pipeline-devices [0,1] --pipeline-chunks 2 "
    "--pipeline-decoder-devices [1] --pipeline-checkpoint always --zero-sharding none "
    "--no-reshard-after-forward --fp32-reduce-scatter --use-sharded-state "
    "--not-fsdp-flatten-parameters --distributed-no-spawn --distributed-num-procs 1",
    "--distributed-world-size 2 --distributed-backend gloo --ddp-backend legacy_ddp --batch-size 4 "
    "--distributed-init-method tcp://localhost:{port}",
    "--distributed-init-method tcp://localhost:{port} --distributed-backend gloo",
    *[f"--ddp-backend {name}" for name in ("c10d", "no_c10d", "pytorch_ddp")],
    # updates and checkpoints
    "--max-epoch 9 --stop-time-hours 1 --clip-norm 0.1 --sentence-avg --update-freq 2 "
    "--stop-min-lr 1e-9 --debug-param-names --skip-remainder-batch --use-bmuf",
    f"--restore-file {START} --reset-optimizer --reset-dataloader --reset-meters "
    "--reset-lr-scheduler",
    f"--continue-once {START} --reset-optimizer --reset-dataloader --reset-meters",
    f"--finetune-from-model {START} --pipeline-checkpoint except_last",
    f"--init-from {START} --optimizer-overrides \"{{'lr': 0.5}}\"",
    "--save-interval 2 --save-interval-updates 1 --keep-interval-updates 1 "
    "--keep-interval-updates-pattern 2 --keep-last-epochs 1 --keep-best-checkpoints 1 "
    "--best-checkpoint-metric ppl --maximize-best-checkpoint-metric --patience 9 "
    "--checkpoint-suffix x --checkpoint-shard-count 2 --load-checkpoint-on-all-dp-ranks",
    "--no-last-checkpoints --no-save-optimizer-state --save-interval-updates 3",
    "--store-ema --ema-decay 0.5 --ema-start-update 2 --ema-update-freq 2 --ema-fp32",
    f"--store-ema --restore-file {START} --reset-optimizer --reset-dataloader --reset-meters",
    # precision
    "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4",
    "--memory-efficient-fp16 --fp16-init-scale 4 --fp16-scale-window 4 --fp16-scale-tolerance 0.5 "
    "--on-cpu-convert-precision --min-loss-scale 0.001 --threshold-loss-scale 1",
    "--pipeline-checkpoint never --amp --amp-batch-retries 1 "
    " --amp-init-scale 4 --amp-scale-window 4",
    # the model
    "--encoder-layers 3 --encoder-embed-dim 8 --encoder-ffn-embed-dim 8 "
    "--encoder-attention-heads 4 --encoder-normalize-before --layernorm-embedding --dropout 0.5 "
    "--attention-dropout 0.5 --activation-dropout 0.5 --max-positions 64 --untie-weights-roberta "
    "--min-params-to-wrap 10 --mha-reg-scale-factor 0.1 --ffn-reg-scale-factor 0.1",
    "--encoder-layerdrop 0.5 --encoder-layers-to-keep 1 --checkpoint-activations",
    "--offload-activations --quant-noise-pq 0.5 --quant-noise-pq-block-size 4",
    "--quant-noise-scalar 0.5 --mha-heads-to-keep 1 --ffn-blocks-to-remove 1",
    # memories
    "--memory-layers 0,1 --memory-share-values --memory-n-keys 12 --memory-heads 1 --memory-knn 2 "
    "--memory-k-dim 4 --memory-v-dim 4 --memory-query mlp --memory-query-norm layer "
    "--memory-values-init zero --memory-value-dtype bfloat16 --memory-input-dropout 0.1 "
    "--memory-query-dropout 0.1 --memory-read-dropout 0.1 --memory-key-dropout 0.1",
    "--memory-mode residual --memory-query linear --memory-query-norm batch --memory-values table "
    "--memory-values-init normal --memory-output linear --memory-value-dtype float32 "
    "--memory-score-activation softmax --memory-value-lr-schedule constant",
    "--memory-mode replace --memory-values experts --memory-output swilu --memory-query-norm none "
    "--memory-score-activation relu --memory-score-scale 0.5 --memory-learn-score-scale "
    "--memory-freeze keys",
    "--memory-usage-interval 2 --memory-usage-draws 3 --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 "
    "--weight-decay 0.01 --memory-value-lr 1e-2 --memory-value-clip-norm 0.1 "
    "--memory-freeze values "
    + POLYNOMIAL
    + "--warmup-updates 2 --force-anneal 1 --end-learning-rate 1e-5 --power 2",
    "--memory-finetune slots --memory-finetune-slots 50% --memory-finetune-score count "
    "--memory-finetune-scope batch --memory-value-optimizer sgd --memory-exchange factors",
    "--memory-finetune values --memory-value-optimizer adam --memory-moment-dtype bfloat16 "
    "--memory-exchange dense --memory-checkpoint parts",
    "--memory-checkpoint whole --memory-moment-dtype float8 "
    "--memory-usage-tokens 50 --memory-value-lr-factor 2 --memory-value-lr-schedule follow "
    "--memory-freeze all --memory-exchange auto",
    # names that are registered, one of each kind at a time
    "--optimizer adadelta --lr-scheduler cosine --bpe byte_bpe --tokenizer space --scoring bleu "
    "--activation-fn relu --dataset-impl raw",
    "--optimizer adafactor --lr-scheduler fixed --bpe bytes --tokenizer moses --scoring chrf "
    "--activation-fn gelu --dataset-impl lazy --sample-break-mode complete",
    "--optimizer adagrad --lr-scheduler inverse_sqrt --bpe characters --tokenizer nltk "
    "--scoring wer --activation-fn gelu_fast --dataset-impl cached "
    "--sample-break-mode complete_doc",
    "--optimizer adam --lr-scheduler manual --bpe fastbpe --scoring meteor "
    "--activation-fn gelu_accurate --dataset-impl mmap --sample-break-mode eos",
    "--optimizer adamax --lr-scheduler reduce_lr_on_plateau --bpe gpt2 --scoring sacrebleu "
    "--activation-fn tanh --dataset-impl fasta --sample-break-mode none",
    "--optimizer nag --lr-scheduler step --bpe hf_byte_bpe --scoring bert_score "
    "--activation-fn linear --dataset-impl huffman",
    "--optimizer sgd --lr-scheduler tri_stage --phase-ratio '(0.1,0.1,0.8)' --bpe sentencepiece",
    "--lr-scheduler triangular --max-lr 1e-2 --bpe subword_nmt",
]
SENTENCES_WORK = [
    "--pooler-activation-fn relu --pooler-dropout 0.5 --load-checkpoint-heads --no-shuffle "
    "--add-prev-output-tokens --separator-token 2 --classification-head-name h",
    "--quant-noise-scalar 0.5 --glue-metrics accuracy,f1,mcc --glue-positive-label yes",
    "--spectral-norm-classification-head --glue-metrics mcc",
]

NOT_HERE = {  # by what they are refused; several are refused by fairseq itself
    "--tpu": "does not work with --optimizer pkm_adam",
    "--bf16": "torch_xla is not installed.*common.bf16=true",
    "--memory-efficient-bf16": "torch_xla is not installed.*common.bf16=true",
    "--fp16": "--fp16 needs CUDA.*--memory-efficient-fp16",
    "--model-parallel-size 2": "megatron submodule",
    "--quantization-config-path q.yaml": "No such file or directory: 'q.yaml'",
    "--profile": "--profile needs CUDA",
    "--use-plasma-view": "--use-plasma-view needs plasma",
    "--write-checkpoints-asynchronously": "needs iopath: pip install iopath",
    "--d2v2-multi": "--d2v2-multi makes batches for data2vec",
    "--optimizer composite": "composite gets its groups from a configuration",
    "--optimizer cpu_adam": "Please install DeepSpeed",
    "--optimizer lamb": "No module named 'apex'",
    "--lr-scheduler pass_through": "can only be used with optimizers with their own schedulers",
    "--lr-scheduler tri_stage": "please specify steps or phase_ratio",
    "--lr-scheduler triangular": "--max-lr: invalid float value",
    "--lr-scheduler cosine --lr 1e-4,1e-3": "Cannot use a fixed learning rate schedule with cosine",
    "--mask-whole-words": "--mask-whole-words needs a --bpe that marks where words begin",
    "--mask-whole-words --bpe sentencepiece --sentencepiece-model none": "file none not found",
    "--distributed-world-size 2": "--distributed-backend is nccl, which needs GPUs",
    "--distributed-init-method tcp://localhost:1": "backend is nccl, which needs GPUs",
    "--distributed-num-procs 2 --distributed-world-size 2": "backend is nccl, which needs GPUs",
    "--ddp-backend fully_sharded --optimizer adam": "No module named 'fairscale'",
    "--ddp-backend slowmo": "--ddp-backend slowmo does not work with --optimizer pkm_adam",
    "--pipeline-model-parallel": "--pipeline-balance is currently required",
    "--zero-sharding os": "--zero-sharding os does not work with --optimizer pkm_adam",
    "--cpu-offload": "--cpu-offload requires --ddp-backend=fully_sharded",
    "--memory-values-file none.pt": "values file none.pt: no such file",
    "--memory-shards 2": "must be a divisor of the number of workers, which is 1",
    "--memory-checkpoint parts --store-ema": "--store-ema does not work with --memory-checkpoint",
    "--memory-checkpoint parts --use-bmuf": "workers hold different values",
    "--memory-moment-dtype float8 --use-bmuf": "--use-bmuf does not work with --memory-moment-",
    "--memory-value-optimizer sgd --use-bmuf": "--use-bmuf does not work with --memory-value-",
    "--memory-checkpoint parts --no-save-optimizer-state": "does not tell all workers",
    "--memory-checkpoint parts --memory-freeze values": "no values are trained",
    "--memory-checkpoint parts --memory-layers []": "no values are trained",
    f"--init-from {START} --continue-once {START}": "--continue-once .* exclude each other",
    f"--store-ema --ema-seed-model {START}": "holds no average.*--store-ema",
    "--memory-value-dtype bfloat16 --store-ema": "bfloat16 needs --ema-fp32",
    "--store-ema --ema-seed-model nowhere.pt": "no checkpoint at nowhere.pt",
    "--memory-value-lr 1e30": "gradients are Nan/Inf",
    "--memory-finetune slots": "scores by tf-idf, which needs --memory-background FILE",
    "--memory-finetune slots --memory-background no.pt": "no.pt: no such file",
    "--memory-finetune slots --memory-finetune-score tf-idf --memory-background no.pt "
    "--memory-finetune-scope data": "needs --memory-finetune-counts FILE",
    "--memory-finetune values --memory-finetune-counts no.pt": "without --memory-finetune slots",
}
NOT_FOR_SENTENCES = {
    "--regression-target": "no numbers of split valid",
    "--report-mcc": "--report-mcc needs labels that are whole numbers.*--glue-metrics mcc",
    "--report-acc-and-f1": "--report-acc-and-f1 needs labels that are whole numbers",
    "--report-pearson-and-spearman": "needs labels that are whole numbers",
    "--glue-metrics f1": "the label dictionary has no, yes.*--glue-positive-label",
}
REGISTERED = {"--arch", "--task", "--criterion"}  # most are not for memories
ELSEWHERE = {"--help", "--save-dir"}


@pytest.fixture(scope="module")
def data(shared: Shared) -> Path:
    """Masked language modelling in ``bin``, sentences with two labels in ``sentences``."""

    def fill(folder: Path) -> None:
        words, labels, rng = small_dictionary(60), Dictionary(), random.Random(0)
        for name in ("no", "yes"):
            labels.add_symbol(name)
        for split, size in (("train", 96), ("valid", 64), ("test", 64)):
            sentences = [_sentence(words, rng) for _ in range(size)]
            write_split(folder / "bin", split, words, sentences)
            write_split(folder / "sentences" / "input0", split, words, sentences)
            of = [labels.index("yes" if sentence[0] % 2 else "no") for sentence in sentences]
            rows = [[label, labels.eos()] for label in of]
            write_split(folder / "sentences" / "label", split, labels, rows)

    return shared("options", fill)


def _sentence(words: Dictionary, rng: random.Random) -> List[int]:
    symbols = range(words.nspecial, len(words) - 1)  # the last one is the mask
    return [*rng.choices(symbols, k=rng.randrange(4, 14)), words.eos()]


@pytest.fixture(scope="module")
def start(data: Path, shared: Shared) -> Path:
    """The folder of a training to start from."""
    return shared("options_start", lambda out: _assert_trained(_train(data, "bin", "", out)))


def _train(data: Path, folder: str, flags: str, out: Path, start: str = "") -> Run:
    task = MASKED_LM if folder == "bin" else SENTENCES
    given = shlex.split(flags.replace("{start}", start).replace("{port}", str(free_port())))
    command = [BIN / "fairseq-train", data / folder, *task, *TRAIN, *ARCH, *MODEL, *MEMORY]
    return run_alike(*command, "--save-dir", out, *given, cwd=out)


def _validate(data: Path, folder: str, run: Path) -> Run:
    task = MASKED_LM if folder == "bin" else SENTENCES
    command = [BIN / "fairseq-validate", data / folder, "--user-dir", USER_DIR, *task[:4], "--cpu"]
    given = ["--batch-size", "8", "--num-workers", "0", "--log-format", "json"]
    return run_alike(*command, *given, "--path", run / "checkpoint_last.pt", cwd=run)


def _assert_trained(done: Run) -> None:
    assert done.status == 0 and "Traceback" not in done.output, done.output[-3000:]
    assert "num_updates: 3 >= max_update: 3" in done.output  # fairseq may end well without one


@pytest.mark.parametrize("flags", MASKED_LM_WORKS)
def test_it_works(flags: str, data: Path, start: Path, tmp_path: Path) -> None:
    _assert_trained(_train(data, "bin", flags, tmp_path, str(start)))


def test_an_average_starts_from_a_checkpoint_without_one(
    data: Path, start: Path, tmp_path: Path
) -> None:
    flags = f"--store-ema --ema-decay 1 --finetune-from-model {START}"
    _assert_trained(_train(data, "bin", flags, tmp_path, str(start)))
    before, after = (
        torch.load(folder / "checkpoint_last.pt", weights_only=False)
        for folder in (start, tmp_path)
    )
    average = after["extra_state"]["ema"]  # decay 1: it stays where it began
    name = "encoder.sentence_encoder.layers.1.fc1.weight"
    assert torch.equal(average[name], before["model"][name])
    assert not torch.equal(after["model"][name], before["model"][name])


def _rewritten(data: Path, out: Path, folder: str, *files: str) -> Path:
    """A copy of a data-bin in which these dictionaries have the opposite order."""
    shutil.copytree(data / folder, out / folder)
    for file in files:
        lines = (out / folder / file).read_text().splitlines()
        (out / folder / file).write_text("\n".join(reversed(lines)) + "\n")
    return out


# by flags; "" resumes
ANOTHER = "trained with another dictionary .sha256 .*: the data must have the same dict.txt"
NOT_OF_THIS_TRAINING = {
    "": ("dict.txt", ANOTHER),
    f"--finetune-from-model {START}": ("dict.txt", ANOTHER),
    "--memory-score-activation relu": ("", "trained with --memory-score-activation softmax, not"),
    f"--finetune-from-model {START} --memory-mode replace": (
        "",
        r"checkpoint has layers.1.fc1.weight, .* only a memory there \(--memory-mode replace\)",
    ),
}


@pytest.mark.parametrize("flags", NOT_OF_THIS_TRAINING)
def test_a_checkpoint_of_another_training_is_refused(
    flags: str, data: Path, start: Path, tmp_path: Path
) -> None:
    changed, said = NOT_OF_THIS_TRAINING[flags]
    other = _rewritten(data, tmp_path / "data", "bin", *([changed] if changed else []))
    out = tmp_path / "out"
    out.mkdir()
    if START not in flags:
        shutil.copy(start / "checkpoint_last.pt", out)
    _assert_refused(_train(other, "bin", f"{flags} --max-update 4", out, str(start)), said)
    if changed:
        _assert_refused(_validate(other, "bin", start), said)


def test_a_checkpoint_of_labels_in_another_order_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _assert_trained(_train(data, "sentences", "", out))
    other = _rewritten(data, tmp_path / "data", "sentences", "label/dict.txt")
    said = "labels of .* are yes, no, must be in the order that .* trained with: no, yes"
    _assert_refused(_train(other, "sentences", "--max-update 4", out), said)
    finetune = f"--finetune-from-model {out / 'checkpoint_last.pt'}"
    (tmp_path / "again").mkdir()
    _assert_refused(_train(other, "sentences", finetune, tmp_path / "again"), said)
    # a new head has its own order
    _assert_trained(
        _train(other, "sentences", f"{finetune} --classification-head-name h", tmp_path / "again")
    )


def test_a_head_with_spectral_norm_is_loaded_again(data: Path, tmp_path: Path) -> None:
    flags = "--spectral-norm-classification-head"
    _assert_trained(_train(data, "sentences", flags, tmp_path))
    before = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert any(name.endswith("out_proj.weight_orig") for name in before)
    done = _train(data, "sentences", f"{flags} --max-update 4", tmp_path)
    assert done.status == 0 and "num_updates: 4 >= max_update: 4" in done.output, done.output
    after = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert set(after) == set(before)
    assert _validate(data, "sentences", tmp_path).status == 0


def test_fairseq_validate_says_what_the_training_said(data: Path, tmp_path: Path) -> None:
    """Staleness, too, which depends on the number of updates."""
    done = _train(data, "bin", "", tmp_path)
    _assert_trained(done)
    (before,), (after,) = done.logged("valid"), _validate(data, "bin", tmp_path).logged("valid")
    keys = [key for key in before if "_memory1_" in key]
    assert any(key.endswith("_read_p90") for key in keys)
    assert {key: after.get(key) for key in keys} == {key: before[key] for key in keys}


@pytest.mark.parametrize("flags", SENTENCES_WORK)
def test_it_works_for_sentences(flags: str, data: Path, tmp_path: Path) -> None:
    _assert_trained(_train(data, "sentences", flags, tmp_path))


def _assert_refused(done: Run, reason: str) -> None:
    assert done.status != 0 and "Traceback" not in done.output, done.output[-3000:]
    assert re.search(reason, last_line(done)), done.output[-3000:]


@pytest.mark.parametrize("flags", NOT_HERE)
def test_it_is_refused_in_one_line(flags: str, data: Path, start: Path, tmp_path: Path) -> None:
    _assert_refused(_train(data, "bin", flags, tmp_path, str(start)), NOT_HERE[flags])


@pytest.mark.parametrize("flags", NOT_FOR_SENTENCES)
def test_it_is_refused_for_sentences(flags: str, data: Path, tmp_path: Path) -> None:
    _assert_refused(_train(data, "sentences", flags, tmp_path), NOT_FOR_SENTENCES[flags])


def _options(task: List[str]) -> Dict[Tuple[str, ...], Optional[Set[str]]]:
    """The choices, if it has some, of each option of a training; an option has several names."""
    parser = options.get_training_parser()
    flags = [*task, *ARCH, "--optimizer", "pkm_adam", "--batch-size", "4", *POLYNOMIAL.split()]
    options.parse_args_and_arch(parser, ["data", *flags])
    return {
        tuple(action.option_strings): None if action.choices is None else {*action.choices}
        for action in parser._actions
        if action.option_strings
    }


def test_no_option_is_left_out() -> None:
    runs = [*MASKED_LM_WORKS, *SENTENCES_WORK, *NOT_HERE, *NOT_FOR_SENTENCES]
    used = {*MASKED_LM, *SENTENCES, *TRAIN, *MODEL, *MEMORY, *ARCH}.union(*map(shlex.split, runs))
    for names, choices in {**_options(MASKED_LM), **_options(SENTENCES)}.items():
        assert used.union(ELSEWHERE).intersection(names), names
        if choices and names[0] not in REGISTERED:
            assert choices <= used, names
