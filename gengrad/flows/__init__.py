"""HOW mass moves: the particle flow itself, learned transports, and the flow that a training run leaves behind."""

from gengrad.flows.cloud import ParticleCloud
from gengrad.flows.flow import Flow, load
from gengrad.flows.gradient import GradientTransport
from gengrad.flows.metering import Samples
from gengrad.flows.monotone import MonotoneTransport
from gengrad.flows.operator import Evolution
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.flows.particles import ParticleFlow, particle_flow
from gengrad.flows.phased import PhasedTransport
from gengrad.flows.transports import PlanTransport, Transport, VelocityTransport

__all__ = [
    "Evolution",
    "Flow",
    "GradientTransport",
    "MonotoneTransport",
    "OperatorTransport",
    "ParticleCloud",
    "ParticleFlow",
    "PhasedTransport",
    "PlanTransport",
    "Samples",
    "Transport",
    "VelocityTransport",
    "load",
    "particle_flow",
]
