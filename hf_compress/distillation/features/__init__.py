"""What a student learns from inside its teacher: which parts are compared, and by which distance."""
