"""What tests of rules and of whole models need."""

from shardwright.testing.rules import check_rule as check_rule
