"""How far rounding may take a result from what is exact, ‖out − exact‖ / ‖exact‖: one table for all.

Tests hold every operator against its float64 definition by it, the tuner every config, a benchmark what it times.
"""

import torch

# Of an operator, by dtype: outputs, whose sums run in float32 at least, and gradients or both together.
OUTPUT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of a model in float32, whose gradients pass through all its layers twice.
LOGITS, MODEL_GRADIENT = 1e-4, 1e-3
# Of any other code in float64, which may amplify rounding more than an operator does.
FOREIGN_FLOAT64 = 1e-10
# Times an operator's: a chain of PyTorch's operators in place of ours rounds after each of them.
CHAIN = 10
# Times the naive path's own distance from the float32 result, in any other precision.
OTHER_PRECISION = 2
