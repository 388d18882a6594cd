"""Reports as one HTML page each, which needs no other file, font or script.

style     figures of matplotlib as SVG in the colours of the page
parts     the page and its elements; the report of a sweep is made of the same
collect   reads the folder of a run
pictures  draws what the page shows and the run has not: the steps of the sampler, real images
page      the page of a run
"""
