"""How XLA compiles small sequential loops on a CPU.

XLA's CPU runtime dispatches every fusion in a loop's body as a kernel of its own, some 50 ns each, unless a step of the loop
touches less than 1 kB; then the whole loop becomes one function. The loops here (rollouts of small systems, adjoint and
Riccati sweeps) do little work a step, so dispatch is nearly all of their time. With the threshold at 256 kB, T = 100, float64:
a Riccati sweep falls from 58 to 10 us at n = 2 and from 1250 to 270 us at n = 12, a rollout of the twelve-state quadrotor from
166 to 6 us. Loops with more work a step, such as networks on large batches, are beyond the threshold and do not change.

XLA reads its flags once, at the first computation of the process: import diffmbrl before that. A threshold in the user's
XLA_FLAGS has precedence. Other backends ignore it.
"""

import os

OPTION = "xla_cpu_small_while_loop_byte_threshold"
THRESHOLD = 262_144  # bytes


def compile_small_loops_whole() -> None:
    """Set the threshold in XLA_FLAGS, unless the user has set backend options there."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options={OPTION}={THRESHOLD}".strip()
