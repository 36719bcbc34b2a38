"""Plans split atoms with noise that belongs to the sample; particle clouds carry new particles with them."""

import pytest
import torch

import gengrad
from gengrad.data import Diracs, Keyed
from gengrad.flows import Flow, ParticleCloud, PlanTransport, particle_flow
from gengrad.flows.cloud import growing_taus
from gengrad.functionals import RieszMMD
from gengrad.networks import Plan


def plan_flow(steps=2):
    torch.manual_seed(0)
    plans = [PlanTransport(Plan(event_shape=(2,), width=8, start=1.0), scale=0.5) for _ in range(steps)]
    return Flow(Diracs(points=[[0.0, 0.0]]), plans)


def test_noise_of_a_sample_is_the_same_in_any_range():
    whole = Keyed(0, 700, 3, "latent").normal(5)
    assert torch.equal(Keyed(300, 500, 3, "latent").normal(5), whole[300:500])
    assert not torch.equal(Keyed(0, 700, 4, "latent").normal(5), whole)
    assert not torch.equal(Keyed(0, 700, 3, "other").normal(5), whole)


def test_a_plan_splits_an_atom_and_each_sample_keeps_its_number():
    flow = plan_flow()
    x = flow.sample(700, seed=3)
    assert len(torch.unique(x, dim=0)) == 700
    for chunk in (256, 100):
        assert torch.allclose(flow.sample(700, seed=3, chunk=chunk), x, atol=1e-6)  # fp32, other shapes of products
    assert torch.allclose(flow.sample(50, seed=3, first=600), x[600:650], atol=1e-6)
    assert not torch.allclose(flow.sample(700, seed=4), x)
    assert torch.equal(flow.trajectory(700, seed=3)[-1], x)


def test_the_steps_of_a_flow_draw_different_noise():
    flow = plan_flow()
    flow.transports[1].load_state_dict(flow.transports[0].state_dict())
    path = flow.trajectory(200)
    first, second = path[1] - path[0], path[2] - path[1]
    assert abs(float(torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1])) < 0.8


def test_a_plan_costs_one_evaluation_each_and_is_counted():
    flow = plan_flow(3)
    assert flow.cost(3) == flow.cost(30) == flow.cost() == 3
    assert flow.draw_samples(10, 30, chunk=4).nfe == 3
    with pytest.raises(ValueError, match="nfe=2 is less"):
        flow.sample(5, nfe=2)


def test_a_saved_plan_gives_the_same_samples(tmp_path):
    flow = plan_flow()
    flow.save(tmp_path)
    again = gengrad.load(tmp_path)
    assert torch.equal(again.sample(20, seed=1), flow.sample(20, seed=1))
    assert again.transports[0].scale == 0.5


def test_a_plan_takes_a_generator_where_no_sample_is_meant():
    transport, x = plan_flow().transports[0], torch.zeros(6, 2)
    one, two = (transport.push(x, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(one, two) and not torch.equal(one, transport.push(x, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("target", [None, torch.tensor([[2.0, 0.0], [2.0, 1.0]])])
def test_the_particles_of_a_cloud_carry_new_particles_where_they_went_themselves(target, tmp_path):
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    taus = growing_taus(1.5, 6)
    flowed = particle_flow(RieszMMD(target), x, taus)
    terms = [{"name": "riesz_mmd", "weight": 1.0, "r": 1.0}]
    cloud = ParticleCloud(flowed.states[:-1], x[:0] if target is None else target, taus, terms)
    path = list(cloud.path(x))
    assert torch.allclose(path[-1], flowed.states[-1], atol=1e-5)  # fp32 sums in another order
    assert cloud.cost(7) == 0 and len(path) == 6
    flow = Flow(Diracs(points=[[0.0, 0.0]]), [cloud])
    flow.save(tmp_path)
    assert torch.equal(gengrad.load(tmp_path).sample(9), flow.sample(9))


def test_growing_steps_end_at_their_total_and_start_small():
    taus = growing_taus(1.2, 10)
    assert sum(taus) == pytest.approx(1.2) and taus[0] == pytest.approx(0.012) and taus == sorted(taus)
