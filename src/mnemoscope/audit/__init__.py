"""Running a method over many prompts: what is asked (``config``, ``prompts``) and the loop that answers (``run``)."""
