"""The peers of benchmarks/sinkhorn.py: debiased velocities from geomloss, POT and ott-jax, as their experts would.

A peer offers `variants(f)`: pairs (algorithm, settings from loose to tight), and
`velocity(x, y, epsilon, variant, setting, warm) -> (v, warm)` on float32 tensors. None of them solves y with y.
"""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import torch

THRESHOLDS = [0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6]


class Geomloss:
    """SamplesLoss(p=2, blur=sqrt(epsilon)), tensorized; two undebiased losses, so that yy is not solved.

    Its gradient in x of OT(x, y) is (x - T_xy) / n, and of OT(x, x'), x' = x held fixed, (x - T_xx) / n.
    """

    def __init__(self):
        from geomloss import SamplesLoss

        self.loss = SamplesLoss

    def variants(self, f):
        return [
            (
                "scaling",
                [0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005],
            )  # one minus geomloss's scaling
        ]

    def velocity(self, x, y, epsilon, variant, setting, warm=None):
        loss = self.loss("sinkhorn", p=2, blur=epsilon**0.5, scaling=1 - setting, debias=False, backend="tensorized")
        x = x.detach().requires_grad_()
        total = (loss(x, x.detach()) - loss(x, y)).sum()
        return torch.autograd.grad(total, x)[0] * x.shape[-2], None

    batch = velocity  # tensors (B, n, d) are its batches


class Pot:
    """ot.sinkhorn on xy and xx: the log, plain and stabilised algorithms, stopped by their thresholds (every 10)."""

    def __init__(self):
        import ot

        self.ot = ot

    def variants(self, f):
        plain = [("plain fp32", THRESHOLDS)] if f >= 0.5 else []
        return [
            *plain,
            ("plain fp64", THRESHOLDS),
            ("log fp32", THRESHOLDS[:9]),
            ("stabilized fp64", THRESHOLDS[:9]),
        ]

    def _map(self, x, y, reg, variant, threshold, warm):
        kind = np.float32 if "fp32" in variant else np.float64
        x, y = x.astype(kind), y.astype(kind)
        cost = self.ot.dist(x, y)
        a, b = np.full(len(x), 1 / len(x), kind), np.full(len(y), 1 / len(y), kind)
        method = {"plain": "sinkhorn", "log": "sinkhorn_log", "stabilized": "sinkhorn_stabilized"}[variant.split()[0]]
        plan, log = self.ot.sinkhorn(
            a,
            b,
            cost,
            reg,
            method=method,
            numItermax=20000,
            stopThr=threshold,
            warn=False,
            log=True,
            warmstart=warm,
        )
        rows = plan.sum(1, keepdims=True)
        keep = (
            (log["log_u"], log["log_v"])
            if "log_u" in log
            else (np.log(log["u"]), np.log(log["v"]))
            if "u" in log
            else None
        )
        return plan @ y / rows, keep

    def velocity(self, x, y, epsilon, variant, setting, warm=None):
        warm = warm or (None, None)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            x, y = x.numpy(), y.numpy()
            target, first = self._map(x, y, 2 * epsilon, variant, setting, warm[0])
            own, second = self._map(x, x, 2 * epsilon, variant, setting, warm[1])
        return torch.from_numpy(np.asarray(target - own)), (first, second)

    def batch(self, x, y, epsilon, variant, setting):
        return torch.stack([self.velocity(*p, epsilon, variant, setting)[0] for p in zip(x, y)])


class Ott:
    """ott-jax, jitted, on a cost matrix made once: lse iterations, with epsilon schedules, momentum or Anderson.

    The self problem takes the parallel updates with momentum 1/2 that ott documents for symmetric problems.
    """

    SCHEDULES = {"lse": None, "lse 0.5": 0.5, "lse 0.8": 0.8, "lse 0.95": 0.95}

    def __init__(self):
        import jax
        from ott.geometry import epsilon_scheduler, geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import acceleration, sinkhorn

        self.jax, self.jnp = jax, jax.numpy
        self.epsilon, self.geometry, self.problem = (
            epsilon_scheduler.Epsilon,
            geometry.Geometry,
            linear_problem.LinearProblem,
        )
        self.acceleration, self.sinkhorn = acceleration, sinkhorn.Sinkhorn
        self.jitted = {}

    def variants(self, f):
        names = (
            ["lse", "lse often", "kernel"]
            if f >= 0.5
            else ["lse", "lse 0.5", "lse 0.8", "lse 0.95", "lse 0.5 momentum", "lse anderson"]
        )
        return [(name, THRESHOLDS) for name in names]

    def _function(self, variant):
        acc = self.acceleration
        decay = next((float(w) for w in variant.split() if w.startswith("0.")), None)
        extra = {
            "max_iterations": 20000,
            "inner_iterations": 2 if "often" in variant else 10,
            "lse_mode": "kernel" not in variant,
        }
        if "momentum" in variant:
            extra["momentum"] = acc.Momentum(start=60, value=1.5)
        if "anderson" in variant:
            extra["anderson"] = acc.AndersonAcceleration(memory=5, refresh_every=2)

        def barycentre(x, y, epsilon, threshold, init, **options):
            cost = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
            target = 2 * epsilon
            schedule = target if decay is None else self.epsilon(target, init=400.0, decay=decay)
            geom = self.geometry(cost_matrix=cost, epsilon=schedule)
            out = self.sinkhorn(threshold=threshold, **options)(self.problem(geom), init=init)
            logits = (out.g - cost) / target
            p = self.jax.nn.softmax(logits, axis=1)
            return p @ y, (out.f, out.g)

        def velocity(x, y, epsilon, threshold, warm):
            first, second = (None, None) if warm is None else warm
            own_options = {k: v for k, v in extra.items() if k not in ("momentum", "anderson")}
            if extra["lse_mode"]:
                own_options |= {"parallel_dual_updates": True, "momentum": acc.Momentum(start=0, value=0.5)}
            target, first = barycentre(x, y, epsilon, threshold, first, **extra)
            own, second = barycentre(x, x, epsilon, threshold, second, **own_options)
            return target - own, (first, second)

        return velocity

    def velocity(self, x, y, epsilon, variant, setting, warm=None):
        if warm is not None and "0." in variant:
            variant = " ".join(w for w in variant.split() if not w.startswith("0."))  # no annealing from a warm start
        f = self.jitted.setdefault(variant, self.jax.jit(self._function(variant)))
        if "kernel" in variant:
            warm = None  # its scalings, not potentials, would be needed
        v, warm = f(self.jnp.asarray(x.numpy()), self.jnp.asarray(y.numpy()), epsilon, setting, warm)
        v.block_until_ready()
        return torch.from_numpy(np.array(v)), warm

    def batch(self, x, y, epsilon, variant, setting):
        function = self._function(variant)
        mapped = self.jax.vmap(lambda p, q, e, t: function(p, q, e, t, None)[0], (0, 0, None, None))
        f = self.jitted.setdefault(variant + " batch", self.jax.jit(mapped))
        return f(self.jnp.asarray(x.numpy()), self.jnp.asarray(y.numpy()), epsilon, setting).block_until_ready()


def available() -> tuple[dict, dict, list[str]]:
    """The installed peers by name, their versions, and the names of the missing ones."""
    peers, versions, missing = {}, {}, []
    for name, module, make in (
        ("geomloss", "geomloss", Geomloss),
        ("POT", "ot", Pot),
        ("ott-jax", "ott", Ott),
    ):
        try:
            versions[name] = importlib.import_module(module).__version__
            peers[name] = make()
        except ImportError as reason:
            missing.append(f"{name} ({reason})")
    return peers, versions, missing
