"""What people look at: figures, one-file HTML pages, comparisons and a dashboard of runs and studies."""
