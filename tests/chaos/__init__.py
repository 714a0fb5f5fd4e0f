"""Tests of the guarantees under killed processes and faulty links; the long versions have the marker
`chaos`."""
