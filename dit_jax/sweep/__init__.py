"""Sweeps: grids of training runs, their cost, their execution, and a report on the results.

grid      expands a sweep file into runs, each with its config
checks    finds the errors of all runs before the first one starts
cost      counts parameters, GMACs and training compute, and estimates device hours
folder    the folder of a sweep and the state of its runs
local     runs them sequentially on this machine; `scores` then scores each with other samplers
remote    writes commands for SLURM, GKE and TPU VMs instead
collect   reads the results of all runs into rows, JSON and CSV
points, fits, paper, figures   rows -> numbers and figures
report, page   the report, as files and as one HTML page of the parts in `dit_jax.report`
"""
