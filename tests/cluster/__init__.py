"""Tests with real schedulers and a real Prometheus, which have to be installed (`make test-cluster`)."""
