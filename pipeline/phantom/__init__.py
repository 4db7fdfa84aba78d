"""Phantom archives: synthetic chest X-rays, drawn, described in prose and written in the archives' public layouts."""
