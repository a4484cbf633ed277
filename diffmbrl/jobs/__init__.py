"""The jobs of the command line as functions: compare, learn, plan, diagnose, sweep, render, resume, doctor."""
