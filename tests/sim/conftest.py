"""A browser for the tests of the planner's page."""

from tests.browser import browser as browser
