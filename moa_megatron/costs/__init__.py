"""What a model costs: parameters, FLOPs, memory. The one source of these numbers.

Log lines, Megatron's throughput (patches/throughput.py), the planner (tools/plan.py) and tests all
read them here.
"""

from moa_megatron.costs.flops import Flops, flops
from moa_megatron.costs.memory import Memory, memory
from moa_megatron.costs.parameters import Parameters, moe_blocks, parameters

__all__ = ["Flops", "Memory", "Parameters", "flops", "memory", "moe_blocks", "parameters"]
