"""Adam with lazy updates of value tables, for any training loop in torch."""

import copy
import logging
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from . import kernels
from .collectives import all_gather
from .exchange import FORMS, average_all
from .gradient import entries_that_may_move, is_exchanged, is_table, table_state
from .kernels import (
    Entries,
    Float8Table,
    StochasticRounding,
    Table,
    allocate,
    at_least_float32,
    compute_dtype,
)
from .kernels.tables import chance_of
from .kernels.torch_backend import row_gradients, store
from .parts import PARTS, TABLE, block_of, open_reference, reference_to, write_parts
from .values import ValueTable

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
TABLES = "_tables_and_states"  # in a copy or pickle
MOMENT_DTYPES = {
    "float32": "float64 for values in float64",
    "bfloat16": "halves their bytes; they are rounded stochastically",
    "float8": "a quarter of their bytes: 8-bit floats with an exponent for each 64 columns; they "
    "are rounded stochastically",
}
VALUE_OPTIMIZERS = {"adam": "", "sgd": "values <- values - lr x gradient; no moments"}
NO_MOMENT = (
    "the state holds no {} of values: it is of values under SGD; start without it, or use "
    "value_optimizer sgd"
)
UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")  # of torch's Adam


class MemoryAdam(torch.optim.Optimizer):
    """AdamW that updates only the rows of value tables that were read.

    It updates a row if and only if the row's accumulated gradient has a non-zero element (the
    papers' sparse updates). Each table has one step count. The update is ``values <- values -
    step_size * exp_avg / (sqrt(exp_avg_sq) + eps)``; ``step_size`` includes Adam's bias
    corrections, as in fairseq's Adam. torch's own AdamW updates all other parameters.

    With several workers in torch.distributed, the optimizer averages the gradients of tables over
    workers, as DistributedDataParallel does, unless they are averaged already.
    ``ignore_tables_in_ddp`` keeps DistributedDataParallel from making them dense.

    If only chosen rows of a table are trained (``pkm_fairseq.memory.finetune``), all other rows
    keep their values and moments, bit for bit.

    Values in bfloat16 and moments in bfloat16 or 8 bits are rounded stochastically
    (``kernels.StochasticRounding``), so that small updates add up. The random bits depend only on
    table, step, row and column. So resumed runs and all workers round in the same way.

    Args:
        params: parameters or groups, as ``memory_param_groups`` makes them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay; must be 0 in a group with a value table.
        foreach: as for torch's AdamW.
        fused: as for torch's AdamW.
        value_optimizer: "adam", or "sgd" for values: ``values <- values - lr * gradient`` for all
            rows that have a gradient, without moments.
        moment_dtype: the dtype of the moments of tables: "float32", "bfloat16" or "float8"
            (``kernels.Float8Table``); float64 for a table in float64. ``state_dict`` holds those in
            8 bits as bfloat16, which is exact.
        exchange: whether to exchange gradients of tables between workers.
        exchange_as: how: "factors" of the gradient, the "dense" gradient, or "auto", which of them
            moves fewer bytes in the first update. It must be the same on all workers.
        process_group: the workers; None means all.

    Raises:
        ValueError: a setting is invalid; the message names it and the allowed values.
    """

    _exchange = True
    _exchange_as = "auto"
    _process_group: Any = None
    _value_optimizer = "adam"
    _moment_dtype = "float32"
    _is_compared = False  # whether the tables of all workers are known to be equal
    _copied: Tuple[str, ...] = (
        "_value_optimizer",
        "_moment_dtype",
        "_exchange",
        "_exchange_as",
        "_process_group",
    )

    def __init__(
        self,
        params: Any,
        lr: Union[float, Tensor] = 1e-3,
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: Optional[bool] = None,
        fused: Optional[bool] = None,
        value_optimizer: str = "adam",
        moment_dtype: str = "float32",
        exchange: bool = True,
        exchange_as: str = "auto",
        process_group: Any = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"{name} is {value}, must be at least 0")
        is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not is_pair or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, must be two numbers in [0, 1)")
        choices = (
            ("value_optimizer", value_optimizer, VALUE_OPTIMIZERS),
            ("moment_dtype", moment_dtype, MOMENT_DTYPES),
            ("exchange_as", exchange_as, FORMS),
        )
        for name, choice, allowed in choices:
            if choice not in allowed:
                raise ValueError(f"{name} is {choice!r}, must be one of {', '.join(allowed)}")
        self._value_optimizer, self._moment_dtype = value_optimizer, moment_dtype
        self._exchange, self._exchange_as = exchange, exchange_as
        self._process_group = process_group
        self._assembled: Dict[nn.Parameter, Dict[str, Tensor]] = {}  # moments to be saved
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {**defaults, "foreach": foreach, "fused": fused})

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        """Add a group as torch does, and make the gradients of its value tables factored.

        Raises:
            ValueError: the group has ``lazy``, as in version 0.1.0, but holds a parameter that is
                not a value table.
        """
        lazy = param_group.pop("lazy", False)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if lazy and not all(map(is_table, params)):
            shape = next(tuple(p.shape) for p in params if not is_table(p))
            self.param_groups.pop()
            raise ValueError(
                f"a lazy group holds a parameter of shape {shape}, which is no value table: leave "
                "lazy away, MemoryAdam knows the tables of ProductKeyMemory"
            )
        self._take_over()

    def _take_over(self) -> None:
        for param in self._tables():
            state = table_state(param)
            state.factored = True
            state.exchange_as, state.exchanged_as = self._exchange_as, None

    def _tables(self) -> List[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if is_table(p)]

    # --- the update ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Perform one update, and clear factored gradients.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            The closure's result; None without a closure.

        Raises:
            ValueError: a group with a value table has a weight decay, the workers' tables differ,
                or rows must be chosen by their reads but the gradient does not count reads.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._end_save()  # what was assembled or referred to is not what the tables will hold
        if self._exchange:
            self.exchange_gradients()
        lazy = [(g, p) for g in self.param_groups for p in g["params"] if is_table(p)]
        dense = [(p, p.grad) for _, p in lazy if type(p.grad) is Tensor]
        updates = []
        for place, (group, param) in enumerate(lazy):
            if group["weight_decay"]:
                raise ValueError(
                    f"a group with a value table has weight_decay {group['weight_decay']}, must be "
                    "0: use memory_param_groups, which gives tables a group of their own"
                )
            entries = entries_that_may_move(param)
            if entries is not None:
                updates.append((group, param, entries, place))
            param.grad = None  # so that _update_rest skips it
        self._update_rest()
        for update in updates:
            self._update_rows(*update)
        for param, grad in dense:
            param.grad = grad
        return loss

    def _update_rest(self) -> None:
        """Update everything except value tables with torch's AdamW."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            for param, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = self._new_step(param)
                    for moment in MOMENTS:
                        state[moment] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["step"] = state["step"].to(param.device if group["fused"] else "cpu")
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=group["foreach"],
                fused=group["fused"],
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )

    def _new_step(self, param: Tensor) -> Any:
        """A new step count for a parameter."""
        return torch.zeros((), dtype=torch.float32)

    def _update_rows(
        self, group: Dict[str, Any], param: nn.Parameter, entries: Entries, place: int
    ) -> None:
        state, shards = self.state[param], table_state(param).shards
        if not state:
            state["step"] = self._new_step(param)
            for moment in self._value_moments():
                state[moment] = self._new_moment(param, moment)
        state["step"] += 1
        first_column = 0 if shards is None else shards.rank * param.shape[1]
        rounding = StochasticRounding(place, int(state["step"]), first_column)
        if self._value_optimizer == "sgd":
            sgd_rows(param, entries, float(group["lr"]), rounding)
            return
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        tables = param, state["exp_avg"], state["exp_avg_sq"]
        step_size = float(group["lr"]) * correction
        kernels.adam_rows(*tables, entries, step_size, group["betas"], group["eps"], rounding)

    def _value_moments(self) -> Tuple[str, ...]:
        """The names of a table's moments."""
        return MOMENTS if self._value_optimizer == "adam" else ()

    def _new_moment(self, param: Tensor, moment: str) -> Table:
        """A moment of zeros."""
        dtype = compute_dtype(param.dtype)
        if not is_table(param):
            return torch.zeros_like(param, dtype=dtype)
        n_slots, width = param.shape
        if self._moment_dtype == "float8" and dtype == torch.float32:
            return Float8Table(n_slots, width, signed=moment == "exp_avg", device=param.device)
        if self._moment_dtype == "bfloat16" and dtype == torch.float32:
            dtype = torch.bfloat16
        return allocate(n_slots, width, dtype, param.device).zero_()

    # --- several workers ----------------------------------------------------------------------

    @torch.no_grad()
    def exchange_gradients(self) -> None:
        """Average the gradients of tables over workers, unless they are averaged already.

        ``step`` calls it. A loop that clips gradients by their norm must call it first, on every
        worker, after its last micro-batch. Otherwise each worker clips by its own norm and scales
        shared gradients differently.
        So must a loop with a ``GradScaler``: if it sees infinities on one worker only, this worker
        skips the step, and the others wait for it in the exchange.

        Raises:
            ValueError: the workers' tables differ, or their ``exchange_as``.
        """
        if not dist.is_available() or not dist.is_initialized():
            return
        tables, group = [p for p in self._tables() if p.requires_grad], self._process_group
        if not tables or dist.get_world_size(group) == 1:
            return
        if not self._is_compared:
            self._compare_tables(tables)
            self._is_compared = True
        lacking = [p.grad is not None and not is_exchanged(p) for p in tables]
        anywhere = torch.tensor(lacking, dtype=torch.int32, device=tables[0].device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=group)  # so that all workers agree
        lacking = anywhere.tolist()
        average_all([p for p, is_lacking in zip(tables, lacking, strict=True) if is_lacking], group)

    def _compare_tables(self, tables: List[nn.Parameter]) -> None:
        """Refuse workers that start from different tables; averaging gradients cannot fix that."""
        whole = [p for p in tables if table_state(p).shards is None]
        if not whole:
            return
        sums = torch.stack([p.detach().sum(dtype=torch.float64) for p in whole])
        for rank, theirs in enumerate(all_gather(sums, self._process_group)):
            if not torch.equal(theirs, sums):
                raise ValueError(
                    f"value tables of worker {rank} differ from those of worker "
                    f"{dist.get_rank(self._process_group)}: broadcast them, or set one seed, "
                    "before the first step"
                )

    # --- saving and loading -------------------------------------------------------------------

    def consolidate_state_dict(self) -> None:
        """Assemble tables that are split over workers on the first worker, for saving.

        Every worker must call it before the first worker calls ``state_dict`` of model and
        optimizer. It holds until the optimizer's state was made after the model's, the next
        ``step``, or the next loading. After an error perhaps only one worker calls it; it does not
        wait for the others.
        """
        tables = [p for p in self._tables() if table_state(p).shards is not None]
        self._end_save()  # of a checkpoint that was not written
        if tables and sys.exc_info()[0] is not None:
            logger.warning("after an error only this worker's columns of the values are saved")
            return
        for param in tables:
            shards, state = table_state(param).shards, self.state.get(param, {})
            assert shards is not None
            table_state(param).assembled = shards.assemble(param)
            moments = [moment for moment in self._value_moments() if state]
            whole = {moment: shards.assemble(state[moment]) for moment in moments}
            self._assembled[param] = {m: x for m, x in whole.items() if x is not None}

    def _end_save(self) -> None:
        self._assembled.clear()
        for param in self._tables():
            table_state(param).end_save()

    def save_parts(self, folder: Path) -> None:
        """Write tables and their moments into a new folder, each worker its own columns.

        Every worker must call it before the first worker calls ``state_dict`` of model and
        optimizer. These states then hold references to the folder instead of tables and moments;
        ``parts.place_parts`` must be called on them before they are loaded. No worker holds whole
        tables in between. It holds as long as that of ``consolidate_state_dict``.

        Args:
            folder: beside the file of the states; complete or absent.

        Raises:
            OSError: on every worker, if a worker could not write.
        """
        tables = self._tables()
        blocks = {}
        for number, param in enumerate(tables):
            shards, state = table_state(param).shards, self.state.get(param, {})
            blocks[f"{number}.{TABLE}"] = block_of(param, shards)
            for moment in self._value_moments() if state else ():
                blocks[f"{number}.{moment}"] = block_of(_saved(state[moment]), shards)
        write_parts(folder, blocks)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for number, param in enumerate(tables):
                table_state(param).reference = reference_to(folder.name, number)

    def state_dict(self) -> Dict[str, Any]:
        """The state to save; moments of split tables are whole after ``consolidate_state_dict``.

        After ``save_parts``, moments are in the folder.
        """
        saved = super().state_dict()
        places = [place for group in saved["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state = dict(saved["state"])
        for place, param in zip(places, params, strict=True):
            if self._assembled.get(param):
                state[place] = {**state[place], **self._assembled[param]}
            if not is_table(param):
                continue
            reference = table_state(param).reference
            if reference is not None and place in state:
                kept = {k: v for k, v in state[place].items() if k not in MOMENTS}
                state[place] = {**kept, PARTS: reference}
            elif place in state:
                state[place] = {name: _saved(x) for name, x in state[place].items()}
            if table_state(param).is_in_state:  # both states of this checkpoint are made
                table_state(param).end_save()
                self._assembled.pop(param, None)
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load a state of this optimizer, of torch's Adam or AdamW, or of fairseq's Adam.

        The state is copied. Moments of tables keep their precision; torch would cast them to the
        dtype of the values.

        Raises:
            ValueError: the groups or shapes do not fit, the state is from a variant of Adam
                that this optimizer does not support, or a folder of moments cannot be read.
        """
        theirs, ours = (
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if theirs != ours:
            raise ValueError(
                f"the state is of groups of {theirs} parameters, must be {ours}: other parameters "
                "were trained; start with a new optimizer (fairseq: --reset-optimizer)"
            )
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state = dict(state_dict["state"])
        moments = {}
        for place, param in zip(places, params, strict=True):
            if place in state and self._keeps_precision(param):
                moments[param] = self._own_moments(param, state[place])
                state[place] = {k: v for k, v in state[place].items() if k not in (*MOMENTS, PARTS)}
        for group in state_dict["param_groups"]:
            for option in UNSUPPORTED:
                if group.get(option):
                    raise ValueError(f"the state is of an Adam with {option}, which must be off")
        self._end_save()  # what was assembled or referred to is not what is loaded
        super().load_state_dict({**state_dict, "state": copy.deepcopy(state)})
        for param, saved in moments.items():
            self.state[param].update(saved)

    def __getstate__(self) -> Dict[str, Any]:
        """Copies and pickles keep the settings, and know the tables, too."""
        settings = {name: getattr(self, name) for name in self._copied}
        tables = [(param, table_state(param)) for param in self._tables()]
        return {**super().__getstate__(), **settings, TABLES: tables}

    def __deepcopy__(self, memo: Any) -> "MemoryAdam":
        """A copy has the same process group, which cannot be copied."""
        memo[id(self._process_group)] = self._process_group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Complete a copy; complete groups and step counts from other kinds of Adam."""
        for param, table in state.pop(TABLES, ()):
            param.value_table = table  # torch does not copy attributes of parameters
        super().__setstate__(state)
        vars(self).setdefault("_assembled", {})
        own = {k: v for k, v in self.defaults.items() if k != "differentiable"}  # torch adds that
        for group in self.param_groups:
            group.pop("lazy", None)  # of version 0.1.0
            for name, value in own.items():
                group.setdefault(name, value)
        for param, saved in self.state.items():
            if "step" in saved:
                saved["step"] = self._new_step(param) + int(saved["step"])
        self._take_over()

    def _keeps_precision(self, param: Tensor) -> bool:
        """Whether moments have their own dtype, independent of the parameter's dtype."""
        return is_table(param)

    def _own_moments(self, param: nn.Parameter, saved: Dict[str, Any]) -> Dict[str, Table]:
        """Copies of the moments of a parameter, or of this worker's columns of a table."""
        if PARTS in saved:
            return self._moments_from_parts(param, saved[PARTS])
        moments = {}
        for moment in self._value_moments() if is_table(param) else MOMENTS:
            if moment not in saved:
                raise ValueError(NO_MOMENT.format(moment))
            whole = saved[moment]
            shards = table_state(param).shards if is_table(param) else None
            if shards is not None:
                whole = shards.own_columns(whole, param.shape[1] * shards.n_shards)
            if whole.shape != param.shape:
                raise ValueError(
                    f"{moment} in the state has shape {tuple(whole.shape)}, must be that of its "
                    f"parameter, {tuple(param.shape)}"
                )
            moments[moment] = self._new_moment(param, moment).copy_(whole)
        return moments

    def _moments_from_parts(self, param: nn.Parameter, reference: Tensor) -> Dict[str, Table]:
        """This worker's columns of the moments of a table, read from a folder."""
        folder, name = open_reference(reference)
        moments: Dict[str, Table] = {}
        for moment in self._value_moments():
            if folder.size(f"{name}{moment}") is None:
                raise ValueError(NO_MOMENT.format(moment))
            own = self._new_moment(param, moment)
            columns = own if isinstance(own, Tensor) else torch.empty(own.shape, dtype=own.dtype)
            folder.read(f"{name}{moment}", block_of(columns, table_state(param).shards))
            moments[moment] = own if isinstance(own, Tensor) else own.copy_(columns)
        return moments


def _saved(state: Any) -> Any:
    """What a checkpoint stores of an item of an optimizer's state."""
    return state.decoded() if isinstance(state, Float8Table) else state


def memory_param_groups(
    model: nn.Module, lr: float = 1e-4, value_lr: float = 1e-3, weight_decay: float = 0.0
) -> List[Dict[str, Any]]:
    """Groups for ``MemoryAdam``: value tables have their own learning rate.

    Args:
        model: any module that holds memories.
        lr: learning rate of everything else (Kim & Jung 2020, by a secondary source: 1e-4).
        value_lr: learning rate of values (Lample et al. 2019: 1e-3, constant).
        weight_decay: weight decay of everything else; values have none.

    Returns:
        The group of everything else and the group of values; empty groups are left out.

    Raises:
        ValueError: a value table is sharded by FSDP or tensor parallelism.
    """
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, ValueTable)}
    for table in tables.values():
        if kernels.is_wrapped(table):
            raise ValueError(
                f"a value table is a {type(table).__name__}, must be whole: tell FSDP, "
                "fully_shard(..., ignored_params={memory.values.weight}), or use torch's AdamW"
            )
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: List[Dict[str, Any]] = [
        {
            "params": [p for p in trained if id(p) not in tables],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p in trained if id(p) in tables],
            "lr": value_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def sgd_rows(
    values: Tensor, entries: Entries, lr: float, rounding: Optional[StochasticRounding] = None
) -> None:
    """One step of gradient descent, in place, on the rows of the entries.

    Args:
        values: (n_slots, V).
        entries: the gradient, on the device of the table.
        lr: the learning rate.
        rounding: of values in bfloat16; None rounds to nearest.
    """
    key, first_column = chance_of(rounding)
    for rows, g in row_gradients(entries):  # (R,), (R, V)
        moves = (g != 0).any(dim=1)
        rows, g = rows[moves], g[moves]
        moved = at_least_float32(values[rows]) - lr * g
        store(values, moved, rows, key, first_column)
