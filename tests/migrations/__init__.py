"""Tests of the migrations, on a real PostgreSQL and through the real command line."""
