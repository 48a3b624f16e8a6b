"""A page of a plan: one HTML file to look at, with nothing to fetch and nothing to install."""

from shardwright.report.page.page import page_data as page_data
from shardwright.report.page.page import render as render
from shardwright.report.page.page import write_page as write_page
