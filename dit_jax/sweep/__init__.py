"""Sweeps: a grid of training runs, what they will cost, running them, and the report on what they found.

grid      a sweep file -> the runs that it means, each with its config
checks    everything that is wrong with any of them, before the first starts
cost      parameters, GMACs, training compute, device hours
folder    where a sweep keeps its runs, and how far each has come
local     runs them one after another; `scores` then samples each with other samplers
remote    writes commands for SLURM, GKE and TPU VMs instead
collect   results of all runs -> rows, JSON, CSV
points, fits, paper, figures, style   rows -> numbers and figures
report, page   all of it, as files and as one HTML page
"""
