"""The documentation site: what is written in `pages/` and `architectures/`, and what is made of the code.

    python -m experiments.site          # or `make site`; then open runs/site/index.html

Tables, pictures, settings and the reference are generated from the layers themselves at every build.
"""
