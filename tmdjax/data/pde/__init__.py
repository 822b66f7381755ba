"""Partial differential equations: solvers, sets of trajectories, files of others."""

from tmdjax.data.pde.conditions import conditions as conditions
from tmdjax.data.pde.equations import burgers as burgers
from tmdjax.data.pde.equations import kolmogorov_flow as kolmogorov_flow
from tmdjax.data.pde.equations import kuramoto_sivashinsky as kuramoto_sivashinsky
from tmdjax.data.pde.equations import velocity_of as velocity_of
from tmdjax.data.pde.etdrk4 import Equation as Equation
from tmdjax.data.pde.etdrk4 import Stepper as Stepper
from tmdjax.data.pde.etdrk4 import etdrk4_coefficients as etdrk4_coefficients
from tmdjax.data.pde.etdrk4 import etdrk4_step as etdrk4_step
from tmdjax.data.pde.etdrk4 import solve as solve
from tmdjax.data.pde.etdrk4 import stepper as stepper
from tmdjax.data.pde.files import read_apebench as read_apebench
from tmdjax.data.pde.files import read_pdearena as read_pdearena
from tmdjax.data.pde.generate import burgers_trajectories as burgers_trajectories
from tmdjax.data.pde.generate import kolmogorov_trajectories as kolmogorov_trajectories
from tmdjax.data.pde.generate import ks_trajectories as ks_trajectories
from tmdjax.data.pde.trajectories import Trajectories as Trajectories
from tmdjax.data.pde.trajectories import every as every
from tmdjax.data.pde.trajectories import read_trajectories as read_trajectories
from tmdjax.data.pde.trajectories import windows as windows
from tmdjax.data.pde.trajectories import write_trajectories as write_trajectories
