"""What a call passes to the kernels of a layer: an array of int64 with the fields named here.

Names of arrays stand for their addresses, 0 where absent. Arrays are contiguous; D directions (or groups), S sources of
the input, B sequences, R rows (time steps of all sequences), I input size, H hidden size, H' state size, G gates.
"""

from .numba_team import FIRST_FIELD

# The plan: parts (a direction and a range of sequences each), how many threads work on one, and their scratch, of which
# the last PAIRS_SIZE values are for rows in pairs. The part table stands in the call itself, behind the barriers.
(PARTS, MEMBERS, PART_TABLE, SCRATCH, SCRATCH_SIZE, PAIRS_SIZE, PACKED) = range(FIRST_FIELD, FIRST_FIELD + 7)

# Rows, hidden units, time steps and depth of a product that are worked on at a time, so that all of it stays in cache;
# AHEAD: whether the weights do not, and are asked for before they are needed.
_next = FIRST_FIELD + 7
(BLOCK_ROWS, BLOCK_UNITS, BLOCK_STEPS, BLOCK_DEPTH, AHEAD) = range(_next, _next + 5)

# CHECKSUMS: of the weights in each panel, int64, where panels are kept from call to call; 0: they are not.
_next += 5
CHECKSUMS = _next
_next += 1
(STEPS, ROWS, BATCH, BATCH_SIZES, RESETS, DIRECTIONS, SOURCES, EXAMPLES, INPUT_SIZE, HIDDEN_SIZE, STATE_SIZE) = range(
    _next, _next + 11
)

# X (R, S, I), WEIGHT_IH (D, G*H, I), WEIGHT_HH (D, G*H, H'), WEIGHT_HR (D, H', H), BIAS_IH and BIAS_HH (D, G*H); the
# same weights in panels; BIAS (D, G*H) and BIAS_HN (D, H), the sums of biases that the time loop adds. A kernel for
# bfloat16 takes x and the weights so, and all other arrays in float32.
_next += 11
(X, WEIGHT_IH, WEIGHT_HH, WEIGHT_HR, BIAS_IH, BIAS_HH) = range(_next, _next + 6)
_next += 6
(PANELS_IH, PANELS_HH, PANELS_HR, BIAS, BIAS_HN) = range(_next, _next + 5)

# HIDDEN (D, B, H') and CELL (D, B, H): the state, the initial one at first; HIDDEN_2: like HIDDEN, where several
# threads share a part. OUTPUT (R, D, H'). GATES (R, D, saved blocks * H), HIDDEN_PREV (R, D, H') and CELL_PREV (R, D,
# H): the reserve. CELLS (R, D, H): the cell state after each step.
_next += 5
(HIDDEN, HIDDEN_2, CELL, OUTPUT, GATES, HIDDEN_PREV, CELL_PREV, CELLS) = range(_next, _next + 8)

# Gradients, each like what it is the gradient of; DGATES like GATES, and maybe the same; D_PROJECTED (R, D, H') and
# UNPROJECTED (R, D, H): the gradient of every projected hidden state, and the state before its projection. Those of
# weights and biases have a dimension of EXAMPLES in front.
_next += 8
(D_OUTPUT, D_HIDDEN, D_CELL, D_CELLS, DGATES, D_PROJECTED, UNPROJECTED) = range(_next, _next + 7)
_next += 7
(DX, D_WEIGHT_IH, D_WEIGHT_HH, D_WEIGHT_HR, D_BIAS_IH, D_BIAS_HH) = range(_next, _next + 6)

# One barrier for every part that several threads share, each on a cache line of its own.
PART_BARRIERS = -(-(_next + 6) // 8) * 8

# One row of the part table: direction, whether it runs backward in time, first batch row, end of batch rows.
PART_FIELDS = 4

# Of a layer whose step is not torch.nn's (``numba_recurrence.py``), whose parts are never shared, from where barriers
# would stand. GATES_X (R, D, its width): the input's share of the gates, all constants added, maybe the same as GATES;
# BIAS and BIAS_HN as above. MASK (D, B, H): by what W_hh's operand is multiplied. KEEP_HIDDEN and KEEP_CELL (R, D, H),
# or one row for all: then their strides from row to row are 0. WEIGHT_LN_IH and WEIGHT_LN_HH (D, G*H), WEIGHT_LN_C and
# BIAS_LN_C (D, H), WEIGHT_CI, WEIGHT_CF and WEIGHT_CO (D, H).
_next = PART_BARRIERS
(GATES_X, GATES_X_WIDTH, MASK, KEEP_HIDDEN, KEEP_CELL, KEEP_HIDDEN_STRIDE, KEEP_CELL_STRIDE) = range(_next, _next + 7)
_next += 7
(WEIGHT_LN_IH, WEIGHT_LN_HH, WEIGHT_LN_C, BIAS_LN_C, WEIGHT_CI, WEIGHT_CF, WEIGHT_CO) = range(_next, _next + 7)

# The rest of the reserve. NORMALIZED_IH and NORMALIZED_HH (R, D, G*H), SCALE_IH and SCALE_HH (R, D): the normalized
# products, and the reciprocals of their standard deviations. OPERAND (R, D, H): what W_hh was multiplied with, and
# OPERAND_N: what its rows of the GRU's n were; the same as HIDDEN_PREV where that is it.
_next += 7
(NORMALIZED_IH, SCALE_IH, NORMALIZED_HH, SCALE_HH, OPERAND, OPERAND_N) = range(_next, _next + 6)

# Of the backward pass alone. D_PRODUCT_IH and D_PRODUCT_HH (R, D, G*H): with layer normalization, the gradients of the
# products. NEW_CELL, NORMALIZED_C and D_NORMALIZED_C (R, D, H): the new cell state, the same normalized, and the
# gradient of what scale and shift make of it.
_next += 6
(D_PRODUCT_IH, D_PRODUCT_HH, NEW_CELL, NORMALIZED_C, D_NORMALIZED_C) = range(_next, _next + 5)

# SUMS: how many sums of columns there are to form, from SUM_TABLE on: gradients of the following, each like what it is
# the gradient of. UNUSED_SUM (D, H): where what is not wanted goes.
_next += 5
(SUMS, SUM_TABLE, D_WEIGHT_LN_IH, D_BIAS_LN_IH, D_WEIGHT_LN_HH, D_BIAS_LN_HH) = range(_next, _next + 6)
_next += 6
(D_WEIGHT_LN_C, D_BIAS_LN_C, D_WEIGHT_CI, D_WEIGHT_CF, D_WEIGHT_CO, UNUSED_SUM) = range(_next, _next + 6)
RECURRENCE_TABLE = _next + 6

# One row of the sum table: the field of the array whose columns are added up, its width and first column; the same of
# what it is multiplied with for the other sum; how many columns; the fields of the sums and of the sums of products,
# their width and first column.
SUM_FIELDS = 11
