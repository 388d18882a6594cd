"""A page in the browser that draws with a trained network.

schema   the fields of a request, as JSON for the page, and their checks
worker   the queue: one thread draws one request after the other
preview  pictures of latents while a sampler runs
access   who is answered: hosts, origins, sizes of requests, headers
server   the routes, and the server's socket
static/  the page

Starlette and uvicorn serve it: two small packages without a build step, and the page stays plain files that load nothing from
elsewhere. Gradio would bring some forty packages, its own front end, and a file server to lock down.
"""
