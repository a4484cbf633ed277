"""Where action limits are squashed: in the policy, in the plant, or in the plant with a small cost on the logit.

`cartpole-balance`, `quadrotor2d` and `cartpole-swingup` at T = 100, 128 training and 256 test starts, three seeds, float64.
All arms start from the same networks, so from the same behaviour, and are judged on the task itself, without the logit's cost:
1% of the curvature of the action's own cost at the centre of its limits, which is what `pendulum-swingup` has.

With a = c + h tanh z, D = h (1 - tanh^2 z) and G_z the derivative of the logit, the gradient is G_z' D g in both, and

    policy:  N = G_z' D M D G_z, M = L' H L in the actions
    plant:   N = G_z' (D M D + L' diag(0, c_a h tanh'' z) L) G_z, the second term projected with H to be positive semidefinite

so all that the plant adds is the bend of the squash in the action's cost. For a cost R a^2 / 2 around the centre their sum is
R h^2 (1 - t^2)(1 - 3 t^2) with t = tanh z, against R h^2 (1 - t^2)^2 in the policy: less, and clipped to nothing beyond
|t| = .58. A cost on the logit adds to it what saturation does not touch. The sensitivity behind trust is measured by noise
where the action enters: of half the limits' width on the action, or of size 1 on the logit, which saturation mutes.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.core import Reward, State, Task
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.optimizers import Krylov
from diffmbrl.policies import centre_and_half
from diffmbrl.rollout import returns
from diffmbrl.tasks.transforms.squash import squashed

NAMES, HORIZON, STARTS, SEEDS = ("cartpole-balance", "quadrotor2d", "cartpole-swingup"), 100, 128, 3
SHARE = 0.01  # of the action cost's curvature, for the cost on the logit
SATURATED = 0.99


class LogitCost(eqx.Module):
    """r(s, z) - sum_i weight_i z_i^2 / 2."""

    inner: Reward
    weight: Float[Array, " m"]

    def __call__(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.inner(s, a) - 0.5 * jnp.sum(self.weight * a**2)


def with_logit_cost(task: Task) -> Task:
    """The squashed task with a cost on its logits."""
    plain = squashed(task)
    s, (centre, half) = task.initial(jax.random.key(0)), centre_and_half(task.a_low, task.a_high)
    curvature = -jnp.diagonal(jax.hessian(lambda a: task.reward(s, a))(centre)) * half**2
    return eqx.tree_at(lambda t: t.reward, plain, LogitCost(plain.reward, SHARE * curvature))


# The task that is trained on, and the one that is judged.
PLACES = {
    "policy": (lambda task: task, lambda task: task),
    "plant": (squashed, squashed),
    "plant, logit cost": (with_logit_cost, squashed),
}
ARMS = {
    "gauss-newton": (
        lambda steps, T: d.Continuation.trusted(d.GaussNewton(system=Krylov(10)), steps, horizon=T),
        150,
        False,
    ),
    "lbfgs": (lambda steps, T: d.Continuation.discounted(d.OptaxSolver(optax.lbfgs, memory_size=20), steps), 600, True),
}
HEAD = [
    "task, method, squash",
    "train",
    "test",
    "test worst",
    "success",
    "saturated start",
    "end",
    "clipped H_aa start",
    "end",
    "clipped H start",
    "end",
    "CPU s",
]


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    rows: list[list[Any]] = []
    arms = []
    for arm in ARMS:
        for name in NAMES[:1] if quick else NAMES:
            for place in PLACES:
                if (arm, place) == ("lbfgs", "plant"):
                    continue  # the same function of the parameters as in the policy, whose curvature it does not ask for
                outcome = _run(name, arm, place, quick)
                arms.append(outcome)
                start, end = outcome["start"], outcome["end"]
                rows.append(
                    [
                        f"{name}, {arm}, {place}",
                        float(np.median(outcome["train"])),
                        float(np.median(end["cost"])),
                        float(np.max(end["cost"])),
                        float(np.mean(end["success"])),
                        *(
                            float(np.mean(x[key]))
                            for key in ("saturated", "clipped_aa", "clipped")
                            for x in (start, end)
                        ),
                        outcome["cpu"],
                    ]
                )
                print(table(HEAD, rows[-1:]).splitlines()[-1], flush=True)
                save("squash", {"columns": HEAD, "rows": rows, "arms": arms}, quick=quick)
    print(f"\nCosts over seeds, medians and worst; {STARTS} starts, float64\n\n{table(HEAD, rows)}")


def _run(name: str, arm: str, place: str, quick: bool) -> dict[str, Any]:
    make, steps, sequential = ARMS[arm]
    steps = steps // 10 if quick else steps
    task = d.tasks.make(name, horizon=50 if quick else HORIZON)
    trained, judged = (change(task) for change in PLACES[place])
    draws = draw_starts(task, SEEDS, STARTS, 256, 0)
    lanes = BatchedPolicyRuns(
        [make(steps, task.horizon)], trained, d.tasks.TASKS[name].hidden, draws, sequential=sequential
    )
    start = _look(lanes.policies, judged, lanes.test)
    whole = learning_curve(lanes, steps, evaluations=1)
    end = _look(lanes.policies, judged, lanes.test)
    train = _train(lanes.policies, judged, lanes.train)
    return {
        "task": name,
        "arm": arm,
        "squash": place,
        "updates": steps,
        "train": np.asarray(train).tolist(),
        "start": {key: np.asarray(x).tolist() for key, x in start.items()},
        "end": {key: np.asarray(x).tolist() for key, x in end.items()},
        "cpu": whole.cpu[-1],
        "compile": whole.compile,
    }


@jax.jit
def _train(policies: Any, task: Task, train: State) -> Array:
    return jax.vmap(lambda policy, s0: -d.mean_return(policy, task, s0))(policies, train)


@jax.jit
def _look(policies: Any, task: Task, s0: State) -> dict[str, Array]:
    """Costs, success, saturation and the curvature that the projection of H clips, for each policy."""

    def negative(H: Array) -> Array:
        values = jnp.linalg.eigvalsh(H)
        return jnp.sum(jnp.maximum(-values, 0)) / jnp.sum(jnp.abs(values))

    success = task.success
    assert success is not None, f"task '{task.name}' does not say what success is"

    def one(policy):
        trajectory = d.rollouts(policy, task, s0)
        z = jax.vmap(jax.vmap(lambda s: policy.net(policy.features(s))))(trajectory.s)

        def cost(x):
            return -task.reward(x[: task.n], x[task.n :])

        H = jax.vmap(jax.vmap(jax.hessian(cost)))(jnp.concatenate([trajectory.s, trajectory.a], axis=-1))
        return {
            "cost": -jnp.mean(jax.vmap(lambda tau: returns(tau, task))(trajectory)),
            "success": jnp.mean(jax.vmap(success)(trajectory.s_T)),
            "saturated": jnp.mean(jnp.abs(jnp.tanh(z)) > SATURATED),
            "clipped_aa": negative(H[..., task.n :, task.n :]),
            "clipped": negative(H),
        }

    return jax.vmap(one)(policies)
