"""Trainings of models with memories by transformers' Trainer: every row of docs/huggingface.md."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import pytest
import torch
from torch import Tensor, nn

from pkm_fairseq.huggingface import MemoryTrainer, MemoryUsageCallback
from pkm_fairseq.huggingface.limits import check_training
from pkm_fairseq.memory import (
    FinetuneConfig,
    MemoryAdam,
    finetune_values,
    memory_param_groups,
)
from pkm_fairseq.memory.gradient import is_table, table_state
from pkm_fairseq.memory.observe.log import read_usage_log
from tests.hf_models import (
    N_SYMBOLS,
    SMALL,
    add_memories,
    configuration,
    plain,
    transformers,
    with_memories,
)
from tests.unit.test_huggingface_support import cells

N_EXAMPLES, LENGTH = 48, 9


def examples() -> List[Dict[str, Tensor]]:
    """Sentences of 7 to 9 tokens, padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(N_EXAMPLES):
        ids = torch.randint(3, N_SYMBOLS, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - number % 3).long()
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def arguments(folder: Path, **more: Any) -> Any:
    """Six updates of four sentences in their order, on the CPU."""
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **more})


def trained(folder: Path, model: Any = None, kind: Any = MemoryTrainer, **more: Any) -> Any:
    """A Trainer that has trained a model; arguments of its own are those that Trainer has."""
    own = ("optimizers", "callbacks", "eval_dataset", "value_lr", "value_lr_schedule")
    own += ("compute_metrics",)
    given = {name: more.pop(name) for name in own if name in more}
    model = with_memories("bert") if model is None else model
    trainer = kind(model, arguments(folder, **more), train_dataset=examples(), **given)
    trainer.train()
    return trainer


def losses(trainer: Any) -> List[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def by_hand(
    model: Any, accumulate: int = 1, clip: float = 1.0, decay: float = 0.0, updates: int = 6
) -> Any:
    """The training of :func:`arguments` in a plain loop; the learning rate falls to 0."""
    model.train()
    no_decay = [p for n, p in model.named_parameters() if p.dim() < 2]
    rest = [p for p in model.parameters() if p.dim() >= 2]
    tables = {id(b.memory.values.weight) for b in model.memory_layers().values()}
    groups = [
        {"params": [p for p in rest if id(p) not in tables], "lr": 1e-2, "weight_decay": decay},
        {"params": no_decay, "lr": 1e-2},
        {"params": [p for p in rest if id(p) in tables], "lr": 1e-3},
    ]
    optimizer = MemoryAdam(groups)
    data = examples()
    for update in range(updates):
        model.run.updates = update
        first = update * 4 * accumulate
        parts = [data[first + 4 * i : first + 4 * i + 4] for i in range(accumulate)]
        for part in parts:  # BERT's own loss: means of accumulated batches add up
            given = {name: torch.stack([x[name] for x in part]) for name in part[0]}
            labels = given.pop("labels")
            logits = model(**given).logits.view(-1, N_SYMBOLS)
            nn.functional.cross_entropy(logits, labels.view(-1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups[:2]:
            group["lr"] = 1e-2 * (1 - update / 6)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_alike(one: Any, other: Any, atol: float = 1e-5) -> None:
    """Two models are the same, but for biases before a batch norm, whose gradient is noise."""
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        if not name.endswith("query_proj.bias"):
            assert torch.allclose(tensor, state[name], rtol=0, atol=atol), name


# --- the rows ---------------------------------------------------------------------------------


def a_trainer_of_transformers(folder: Path) -> None:
    model = with_memories("bert")
    start = copy.deepcopy(model)
    optimizer = MemoryAdam(memory_param_groups(model, lr=1e-2, value_lr=1e-3))
    trained(folder, model, transformers.Trainer, optimizers=(optimizer, None))
    values = model.memory_layers()[0].memory.values.weight
    moved = (values != start.memory_layers()[0].memory.values.weight).any(1)
    assert int(moved.sum()) > 0
    assert model.memory_layers()[0].memory.values.factored  # no dense gradient of the table


def memory_trainer(folder: Path) -> None:
    model = with_memories("bert")
    expected = by_hand(copy.deepcopy(model))
    assert_alike(trained(folder, model).model, expected)


def another_optimizer(folder: Path) -> None:
    model = with_memories("bert")
    before = model.memory_layers()[0].memory.values.weight.detach().clone()
    trained(folder, model, transformers.Trainer, max_steps=2)
    after = model.memory_layers()[0].memory.values.weight
    assert not torch.equal(before, after)
    assert not model.memory_layers()[0].memory.values.factored


def accumulation(folder: Path) -> None:
    model = with_memories("bert")
    expected = by_hand(copy.deepcopy(model), accumulate=2)
    assert_alike(trained(folder, model, gradient_accumulation_steps=2).model, expected)


def clipping(folder: Path) -> None:
    model = with_memories("bert")
    expected = by_hand(copy.deepcopy(model), clip=0.01)
    assert_alike(trained(folder, model, max_grad_norm=0.01).model, expected)


def weight_decay(folder: Path) -> None:
    model = with_memories("bert")
    expected = by_hand(copy.deepcopy(model), decay=0.5)
    trainer = trained(folder, model, weight_decay=0.5)
    assert_alike(trainer.model, expected)
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.5, 0.0, 0.0]


def schedule(folder: Path) -> None:
    trainer = trained(folder, lr_scheduler_type="cosine", warmup_steps=2)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.0, 0.0, 1e-3]
    follows = trained(folder, value_lr_schedule="follow", value_lr=1e-2)
    assert [group["lr"] for group in follows.optimizer.param_groups] == [0.0, 0.0, 0.0]


def bf16(folder: Path) -> None:
    one, other = (trained(folder, with_memories("bert"), bf16=x) for x in (True, False))
    assert one.model.dtype == torch.float32
    assert losses(one) != losses(other)
    assert losses(one) == pytest.approx(losses(other), abs=0.1)


def checkpointing(folder: Path) -> None:
    model = with_memories("bert")
    twin = copy.deepcopy(model)
    trained(folder, model, activation_checkpointing=True)
    assert model.is_activation_checkpointing
    assert_alike(model, trained(folder, twin).model)


def resuming(folder: Path) -> None:
    model = with_memories("bert")
    first, whole = copy.deepcopy(model), trained(folder / "whole", model, max_steps=6)
    trained(folder, first, save_strategy="steps", save_steps=3)
    again = add_memories(plain("bert"), SMALL, [0, 2])  # other parameters, to be loaded over
    trainer = MemoryTrainer(again, arguments(folder), train_dataset=examples())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def evaluation(folder: Path) -> None:
    usage = MemoryUsageCallback(interval=2, draws=1)
    trainer = trained(
        folder, callbacks=[usage], eval_dataset=examples()[:8], eval_strategy="steps", eval_steps=3
    )
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluated] == [3, 6]
    assert all(0 < log["eval_memory2_top1_usage"] <= 1 for log in evaluated)


def usage_log(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    usage = MemoryUsageCallback(interval=3, draws=1)
    trainer = trained(
        folder,
        callbacks=[usage],
        report_to=["tensorboard"],
        eval_dataset=examples()[:8],
        eval_strategy="steps",
        eval_steps=6,
    )
    assert trainer.callback_handler.callbacks.count(usage) == 1
    header, records = read_usage_log(folder / "memory_usage.jsonl")
    assert header["layers"]["2"] == {"n_slots": 64, "heads": 2, "knn": 4}
    assert [(x["update"], x["split"]) for x in records] == [(1, "train"), (4, "train"), (6, "eval")]
    said = records[1]["layers"][0]
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["memory0_top1_usage"] == said["top1_usage"]
    assert last["memory0_read_never"] == said["staleness"]["read"]["never"]
    assert said["staleness"]["moved"]["max"] > 0
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    names = {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]}
    assert {"memory0_top1_usage", "memory2_top1_usage"} <= names


def compiled(folder: Path) -> None:
    config = configuration("bert", num_hidden_layers=1)  # one block is enough, and traced sooner
    model = add_memories(transformers.BertForMaskedLM(config), SMALL, [0])
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    how = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert_alike(
        trained(folder, model, **how, max_steps=1).model, trained(folder, twin, max_steps=1).model
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("training", [False, True])
def test_a_model_is_one_graph(training: bool) -> None:
    config = configuration("bert", num_hidden_layers=2, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    model = add_memories(transformers.BertForMaskedLM(config), SMALL, [0]).train(training)
    for part in model.modules():
        getattr(part, "observers", []).clear()
    twin, ids = copy.deepcopy(model), torch.randint(5, 20, (2, 7))
    torch._dynamo.reset()
    compiled_twin = torch.compile(twin, backend="aot_eager", fullgraph=True)
    losses = [x(input_ids=ids, labels=ids).loss for x in (model, compiled_twin)]
    assert torch.allclose(*losses, atol=1e-5)
    if training:
        torch.stack(losses).sum().backward()
        assert_alike_gradients(model, twin)


def assert_alike_gradients(model: Any, twin: Any) -> None:
    values = 0
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
        values += "values" in name and bool(one.grad.abs().sum() > 0)
    assert values


def peft() -> None:
    model = with_memories("bert")
    model.peft_config = {}  # what PEFT's models have
    check_training(model, made_up())


def made_up(**more: Any) -> Any:
    return SimpleNamespace(**{"deepspeed": None, "fsdp": None, "n_gpu": 0, **more})


WORKS: Dict[str, Callable[[Path], None]] = {
    "`Trainer(optimizers=(MemoryAdam(...), None))`": a_trainer_of_transformers,
    "`MemoryTrainer`": memory_trainer,
    "`Trainer` with its own optimizer": another_optimizer,
    "`gradient_accumulation_steps`": accumulation,
    "`max_grad_norm`": clipping,
    "`weight_decay`": weight_decay,
    "`lr_scheduler_type`": schedule,
    "`bf16`": bf16,
    "`activation_checkpointing`": checkpointing,
    "`resume_from_checkpoint`": resuming,
    "`eval_strategy`": evaluation,
    "TensorBoard, `memory_usage.jsonl`": usage_log,
    "`torch_compile`": compiled,
}
REFUSED: Dict[str, Callable[[], Any]] = {
    "DeepSpeed": lambda: check_training(with_memories("bert"), made_up(deepspeed={"zero": 2})),
    "FSDP": lambda: check_training(with_memories("bert"), made_up(fsdp=True)),
    "PEFT": peft,
    "several GPUs in one process": lambda: check_training(with_memories("bert"), made_up(n_gpu=2)),
    "8-bit and other optimizers in `MemoryTrainer`": lambda: MemoryTrainer(
        with_memories("bert"), arguments(Path("unused"), optim="adafactor")
    ),
}
ELSEWHERE = {"two processes, gloo": "tests/integration/test_huggingface_workers.py"}
NOT_RUN = {"`fp16`", "FlashAttention"}  # a GPU


def test_the_table_of_trainings_is_whole() -> None:
    rows = {row: cell for row, column, cell in cells("training") if column == "state"}
    assert {row for row, cell in rows.items() if cell.startswith("works")} == {*WORKS, *ELSEWHERE}
    assert {row for row, cell in rows.items() if cell.startswith("refused")} == set(REFUSED)
    assert {row for row, cell in rows.items() if cell.startswith("not run")} == NOT_RUN
    assert len(rows) == len({*WORKS, *ELSEWHERE, *REFUSED, *NOT_RUN})


@pytest.mark.parametrize("row", WORKS)
def test_what_works(row: str, tmp_path: Path) -> None:
    WORKS[row](tmp_path)


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused(row: str) -> None:
    (said,) = [x for r, column, x in cells("training") if r == row and column == "message"]
    with pytest.raises(ValueError) as refused:
        REFUSED[row]()
    assert said.strip("`") in str(refused.value) and "\n" not in str(refused.value)


# --- the callback -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": -1}, "interval is -1, must be at least 0"),
        ({"draws": 0}, "draws is 0, must be at least 1"),
        ({"tokens": -1}, "tokens is -1, must be at least 0"),
    ],
)
def test_a_count_that_cannot_be_is_refused(settings: Dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryUsageCallback(**settings)


def test_a_callback_in_a_trainer_of_transformers_logs_the_same(tmp_path: Path) -> None:
    model = with_memories("bert")
    twin = copy.deepcopy(model)
    found = []
    for kind, one in ((MemoryTrainer, model), (transformers.Trainer, twin)):
        usage = MemoryUsageCallback(interval=2, tokens=30)
        folder = tmp_path / kind.__name__
        trainer = trained(folder, one, kind, callbacks=[usage], max_steps=1)
        found.append([k for k in trainer.state.log_history[0] if "memory" in k])
        assert (folder / "memory_usage.jsonl").exists()
    assert found[0] == found[1] and "memory0_top1_usage" in found[0]


def test_a_count_is_of_training_batches_or_of_an_evaluation_not_of_both(tmp_path: Path) -> None:
    """12 sentences of 9, 8, 7 tokens are evaluated while a count of training batches is open."""
    usage = MemoryUsageCallback(interval=4, tokens=70)
    trained(
        tmp_path,
        callbacks=[usage],
        eval_dataset=examples()[:12],
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
    )
    _, records = read_usage_log(tmp_path / "memory_usage.jsonl")
    found = [(x["update"], x["split"], x["layers"][0]["tokens"]) for x in records]
    assert found == [
        (1, "eval", 70),
        (2, "eval", 70),
        (3, "train", 70),
        (3, "eval", 70),
    ]


def test_an_evaluation_of_the_training_set_is_no_training(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=2, callbacks=[MemoryUsageCallback(interval=1, tokens=8)])
    trained_on = trainer.evaluate(examples()[:4], metric_key_prefix="train")
    assert trained_on["train_memory0_tokens"] == 8 and "memory0_tokens" not in trained_on
    assert trainer.evaluate(examples()[:1])["eval_memory0_tokens"] == 8
    _, records = read_usage_log(tmp_path / "memory_usage.jsonl")
    assert [x["split"] for x in records] == ["train", "train", "train_evaluation", "eval"]


def test_look_ups_of_predict_are_in_no_evaluation(tmp_path: Path) -> None:
    trainer = MemoryTrainer(with_memories("bert"), arguments(tmp_path))
    alone = trainer.evaluate(examples()[:2])
    trainer.predict(examples()[2:12])
    after = trainer.evaluate(examples()[:2])
    usage = {key: value for key, value in alone.items() if "memory" in key}
    assert usage["eval_memory0_tokens"] == 9 + 8
    assert {key: value for key, value in after.items() if "memory" in key} == usage
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved/README.md").read_text()
    assert "Counted over 17 tokens of 'eval'." in card  # no training, so no update


def test_a_callback_that_is_added_later_does_not_hinder_predict(tmp_path: Path) -> None:
    trainer = MemoryTrainer(with_memories("bert"), arguments(tmp_path), callbacks=[])
    trainer.add_callback(MemoryUsageCallback())
    assert len(trainer.predict(examples()[:4]).predictions) == 4


def test_a_callback_that_is_added_later_refuses_a_model_without_memories(tmp_path: Path) -> None:
    trainer = transformers.Trainer(plain("bert"), arguments(tmp_path), train_dataset=examples())
    trainer.add_callback(MemoryUsageCallback())
    with pytest.raises(ValueError, match="the model has no memories: call add_memories first"):
        trainer.train()


def test_a_log_of_other_memories_ends_the_training(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1)
    other = add_memories(plain("bert"), SMALL, [1])
    with pytest.raises(ValueError, match=r"memory usage: .* is the log of memories of other"):
        trained(tmp_path, other, max_steps=1)


def test_chosen_rows_of_values_alone_are_finetuned(tmp_path: Path) -> None:
    model = with_memories("bert")
    memories = {index: block.memory for index, block in model.memory_layers().items()}
    config = FinetuneConfig(finetune="slots", finetune_slots="5", finetune_score="count")
    finetune_values(model, memories, config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trained(tmp_path, model, gradient_accumulation_steps=2)
    for name, x in model.state_dict().items():
        if not name.endswith("values.weight"):
            assert ".reads." in name or torch.equal(x, before[name]), name
            continue
        assert 5 <= int((x != before[name]).any(dim=1).sum()) <= 6 * 5 < len(x), name


def staleness_of(record: Dict[str, Any]) -> Dict[str, Any]:
    found: Dict[str, Any] = record["layers"][0]["staleness"]
    return found


def test_the_last_count_is_of_the_last_model_and_an_evaluation_of_the_best(tmp_path: Path) -> None:
    scores = iter([-1.0, -2.0, -3.0, -4.0])  # the first evaluation is the best
    model = with_memories("bert")
    trainer = MemoryTrainer(
        model,
        arguments(
            tmp_path,
            **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
            **dict.fromkeys(("eval_steps", "save_steps"), 2),
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=examples(),
        eval_dataset=examples()[:4],
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[MemoryUsageCallback(interval=1000)],
    )
    trainer.train()
    trainer.evaluate()
    _, records = read_usage_log(tmp_path / "memory_usage.jsonl")
    assert [(x["update"], x["split"]) for x in records] == [
        *((2, "eval"), (4, "eval"), (6, "eval"), (6, "train")),
        (2, "eval"),  # of the best model, which was loaded
    ]
    before, last = records[2], records[3]  # of the model after 6 updates
    assert staleness_of(last) == staleness_of(before) != staleness_of(records[0])
    assert staleness_of(records[4]) == staleness_of(records[0])


def test_a_trainer_that_did_not_train_a_model_does_not_know_its_updates(tmp_path: Path) -> None:
    model = trained(tmp_path, max_steps=2).model
    found = MemoryTrainer(model, arguments(tmp_path / "other")).evaluate(examples()[:4])
    assert "eval_memory0_top1_usage" in found and "eval_memory0_read_p50" not in found
    assert model.memory_usage["update"] is None


def test_a_metric_may_be_a_runtime(tmp_path: Path) -> None:
    trained(
        tmp_path,
        max_steps=1,
        eval_dataset=examples()[:4],
        eval_strategy="steps",
        compute_metrics=lambda _: {"model_runtime": 1.0},
    )
    _, records = read_usage_log(tmp_path / "memory_usage.jsonl")
    assert {x["split"] for x in records} == {"train", "eval"}


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_what_accelerate_turns_on_is_refused_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_training(with_memories("bert"), made_up())
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} splits or flattens parameters"):
        check_training(with_memories("bert"), made_up())


def test_a_trainer_needs_a_model_not_its_making(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MemoryTrainer needs the model, not model_init"):
        MemoryTrainer(None, arguments(tmp_path), model_init=lambda: with_memories("bert"))


def test_times_of_reads_are_noted_by_update(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=3, gradient_accumulation_steps=2)
    times = trainer.model.memory_layers()[0].reads.last_read
    assert set(times.tolist()) <= {0.0, 1.0, 2.0, 3.0} and float(times.max()) == 3


def test_the_model_card_says_what_was_counted(tmp_path: Path) -> None:
    usage = MemoryUsageCallback(interval=1, draws=1)
    trainer = trained(tmp_path, callbacks=[usage], max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    lines = (tmp_path / "memory_usage.jsonl").read_text().splitlines()
    last: Dict[str, Any] = json.loads(lines[-1])
    card = (tmp_path / "saved/README.md").read_text()
    assert f"Counted at update {last['update']}, over" in card
    assert f"{last['layers'][0]['top1_usage']:.4g}" in card


def test_a_schedule_that_treats_all_groups_alike_is_refused(tmp_path: Path) -> None:
    message = "lr_scheduler_type reduce_lr_on_plateau treats all groups alike: give value_lr_sched"
    with pytest.raises(ValueError, match=message):
        trained(
            tmp_path,
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_dataset=examples()[:4],
            eval_strategy="steps",
        )


def test_another_optimizer_is_refused_however_it_is_given(tmp_path: Path) -> None:
    given = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs is .*SGD.*, must be None: M"):
        MemoryTrainer(with_memories("bert"), arguments(tmp_path), optimizer_cls_and_kwargs=given)


def test_a_trainer_says_how_workers_exchange_gradients_of_tables(tmp_path: Path) -> None:
    model = with_memories("bert")
    trainer = MemoryTrainer(model, arguments(tmp_path), exchange_as="dense")
    trainer.create_optimizer()
    tables = [p for p in model.parameters() if is_table(p)]
    assert {table_state(table).exchange_as for table in tables} == {"dense"}
    with pytest.raises(ValueError, match="exchange_as is 'sum', must be one of auto, factors, den"):
        MemoryTrainer(model, arguments(tmp_path), exchange_as="sum").create_optimizer()


def test_a_model_without_memories_is_refused(tmp_path: Path) -> None:
    model: Optional[Any] = plain("bert")
    with pytest.raises(ValueError, match="the model has no memories: call add_memories first"):
        MemoryTrainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="the model has no memories: call add_memories first"):
        transformers.Trainer(model, arguments(tmp_path), callbacks=[MemoryUsageCallback()])
    with pytest.raises(ValueError, match="value_lr_schedule is 'none', must be one of constant, f"):
        MemoryTrainer(with_memories("bert"), arguments(tmp_path), value_lr_schedule="none")
