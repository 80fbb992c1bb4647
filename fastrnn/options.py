"""The constructor arguments that torch.nn does not have: their checks, parameters, and what a call draws for them."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .reference import CELLS, Extras

# Options that change the step of a cell; the others change the weights before it or the output behind it.
STEP_OPTIONS = frozenset({"reset_after", "recurrent_dropout", "zoneout", "layer_norm", "peephole", "periods"})


class Options(NamedTuple):
    """A layer's options, as ``fastrnn.RNN``, ``GRU`` and ``LSTM`` describe them; the defaults are torch.nn's layer."""

    reset_after: bool = True
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    peephole: bool = False
    residual: bool = False
    periods: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those that differ from torch.nn's layer."""
        return tuple(name for name in self._fields if getattr(self, name) != self._field_defaults[name])

    def __str__(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.names)

    def in_effect(self, training: bool) -> tuple[str, ...]:
        """The names of those that change what a call computes."""
        only_in_training = ("recurrent_dropout", "weight_dropout")
        return tuple(name for name in self.names if training or name not in only_in_training)


def checked(options: Options, mode: str, hidden_size: int) -> Options | None:
    """The options in their usual form, or None where they are torch.nn's layer.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: one is out of range or does not go with another, or with the size.
    """
    for name in ("reset_after", "layer_norm", "peephole", "residual"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name} should be True or False, got {getattr(options, name)!r}")
    zoneout, periods = options.zoneout, options.periods
    if isinstance(zoneout, tuple | list):
        if mode != "LSTM" or len(zoneout) != 2:
            raise ValueError(
                f"zoneout should be a number, for an LSTM also a pair (of c, of h), got {zoneout!r} for {mode}"
            )
        zoneout = tuple(_probability("zoneout", part) for part in zoneout)
        zoneout = 0.0 if zoneout == (0.0, 0.0) else zoneout
    else:
        zoneout = _probability("zoneout", zoneout)
    if periods is not None:
        periods = _checked_periods(periods, hidden_size)
    options = options._replace(
        recurrent_dropout=_probability("recurrent_dropout", options.recurrent_dropout),
        weight_dropout=_probability("weight_dropout", options.weight_dropout),
        zoneout=zoneout,
        periods=periods,
    )
    if options.layer_norm and not options.reset_after:
        raise ValueError(
            "layer_norm normalizes all of W_hh h at once, reset_after=False makes two products of it: choose one"
        )
    return options if options.names else None


def refuse_checkpoint(options: Options | None, checkpoint: int | None) -> None:
    """Raise ValueError where ``checkpoint`` would keep everything, against what it is there for."""
    changed = [] if options is None or checkpoint is None else [name for name in options.names if name in STEP_OPTIONS]
    if changed:
        raise ValueError(f"checkpoint={checkpoint} does not go with {', '.join(changed)}: leave it None")


def _probability(name: str, value) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} should be a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number from 0 to 1, got {value!r}")
    return float(value)


def _checked_periods(periods, hidden_size: int) -> tuple[int, ...]:
    if not isinstance(periods, tuple | list) or not all(type(period) is int for period in periods):
        raise TypeError(f"periods should be a tuple of whole numbers, got {periods!r}")
    if not periods or min(periods) < 1:
        raise ValueError(f"periods should be one or more numbers of time steps, 1 or more each, got {periods!r}")
    if hidden_size % len(periods):
        raise ValueError(
            f"{len(periods)} periods need a hidden_size that is a multiple of {len(periods)}, got {hidden_size}"
        )
    return tuple(periods)


def parameter_sizes(options: Options, mode: str, hidden_size: int) -> dict[str, int]:
    """The length of every further parameter of one layer and direction, by its role; see ``reference.Extras``."""
    gate_size, is_lstm = CELLS[mode.lower()].gates * hidden_size, mode == "LSTM"
    sizes = {}
    if options.peephole:
        sizes |= dict.fromkeys(("weight_ci", "weight_cf", "weight_co"), hidden_size)
    if options.layer_norm:
        sizes |= dict.fromkeys(("weight_ln_ih", "bias_ln_ih", "weight_ln_hh", "bias_ln_hh"), gate_size)
        if is_lstm:
            sizes |= dict.fromkeys(("weight_ln_c", "bias_ln_c"), hidden_size)
    return sizes


def recurrent_weight(options: Options, weight_hh: Tensor, training: bool) -> Tensor:
    """``weight_hh``, (G*H, H') of one group or (D, G*H, H'), as a call multiplies with it."""
    if options.periods is not None:
        weight_hh = weight_hh * _connections(options.periods, weight_hh)
    # DropConnect: Wan et al. (2013), for recurrent weights Merity et al. (2018)
    return functional.dropout(weight_hh, options.weight_dropout, training)


def _period_of_units(periods: tuple[int, ...], hidden_size: int, device) -> Tensor:
    return torch.tensor(periods, device=device).repeat_interleave(hidden_size // len(periods))


def _connections(periods: tuple[int, ...], weight_hh: Tensor) -> Tensor:
    """Koutník et al. (2014): 1 where a unit reads one of its own or a longer period, else 0."""
    period = _period_of_units(periods, weight_hh.shape[-1], weight_hh.device)
    return (period[:, None] <= period).to(weight_hh.dtype)


def extras(
    options: Options,
    parameters: dict[str, Tensor],
    state: tuple[Tensor, ...],
    rows: int,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    training: bool,
) -> Extras | None:
    """What one layer computes with in one call, or None where its step is torch.nn's.

    Args:
        parameters: further parameters by role, (D, .) each.
        state: h0 (D, B, H') and, for the LSTM, c0 (D, B, H).
        rows: time steps of all sequences.
        batch_sizes: of a packed input.
        resets: (rows, D) bool.
        training: masks are drawn; else zoneout is its expectation.
    """
    if not STEP_OPTIONS.intersection(options.in_effect(training)):
        return None
    # masks are of the dtype in which the state goes from step to step
    state = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in state]
    h0 = state[0]
    recurrent_mask = None
    if options.recurrent_dropout and training:
        recurrent_mask = functional.dropout(torch.ones_like(h0), options.recurrent_dropout)
    of_cell, of_hidden = options.zoneout if isinstance(options.zoneout, tuple) else (options.zoneout, options.zoneout)
    keep_cell = _zoneout(of_cell, state[1], rows, training) if len(state) == 2 else None
    keep_hidden = _zoneout(of_hidden, h0, rows, training)
    if options.periods is not None:
        held = _held_by_clock(options.periods, h0, rows, batch_sizes, resets)
        keep_hidden = held if keep_hidden is None else torch.maximum(held, keep_hidden)
    return Extras(
        options.reset_after, **parameters, recurrent_mask=recurrent_mask, keep_hidden=keep_hidden, keep_cell=keep_cell
    )


def _zoneout(share: float, state: Tensor, rows: int, training: bool) -> Tensor | None:
    """Krueger et al. (2017): what stays of a state (D, B, .), drawn for every row, or its expectation for all."""
    if not share:
        return None
    if not training:
        return torch.full_like(state[:, 0], share).unsqueeze(0)
    shape = rows, state.shape[0], state.shape[2]
    # twice as fast as bernoulli_ on a CPU; float32, so that all dtypes take the same mask
    return (torch.rand(shape, dtype=torch.float32, device=state.device) < share).to(state.dtype)


def _held_by_clock(
    periods: tuple[int, ...], h0: Tensor, rows: int, batch_sizes: Tensor | None, resets: Tensor | None
) -> Tensor:
    """Koutník et al. (2014): 1 where the time of a row is no multiple of a unit's period, (rows, D, H).

    Time counts from the first step of a sequence, in both directions, and begins anew at a reset.
    """
    groups, batch, size = h0.shape
    device = h0.device
    if batch_sizes is None:
        time = torch.arange(rows // batch, device=device).repeat_interleave(batch)
        if resets is not None:
            begins = torch.where(resets[:, 0], time, 0).view(-1, batch)
            time = time - begins.cummax(0).values.reshape(-1)
    else:
        steps = torch.arange(len(batch_sizes), device="cpu").repeat_interleave(batch_sizes)
        time = steps.to(device)
        if resets is not None:
            sequences = torch.cat([torch.arange(count, device="cpu") for count in batch_sizes.tolist()]).to(device)
            nowhere = torch.zeros(len(batch_sizes), batch, dtype=torch.int64, device=device)
            begins = nowhere.index_put((time, sequences), torch.where(resets[:, 0], time, 0))
            time = time - begins.cummax(0).values[time, sequences]
    held = time[:, None] % _period_of_units(periods, size, h0.device) != 0
    return held.to(h0.dtype).unsqueeze(1).expand(rows, groups, size)
