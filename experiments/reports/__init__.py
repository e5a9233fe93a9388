"""Reports: one HTML file that shows itself.

page        sections of prose, tables and figures, written as one file, with what is in templates/
figures     the figures of a comparison, from plain numbers;  axes and colours: how they look
svg         a matplotlib figure as inline SVG whose points can be read
numbers     how numbers are written, means and deviations
comparison  what a comparison leaves behind
"""
