"""A page of a plan: one HTML file to look at, with nothing to fetch and nothing to install.

==========  =========================================================================================================
``page``    one HTML file to look at, with nothing to fetch and nothing to install
``tables``  the tables of a plan's page: layouts, tensors and operators, each written once however many nodes have it
``tree``    the modules of a graph as a tree, layers that are alike folded into one
==========  =========================================================================================================
"""

from shardwright.report.page.page import page_data as page_data
from shardwright.report.page.page import render as render
from shardwright.report.page.page import write_page as write_page
