"""Code beside the plugin: the demo, the GLUE runner, the benchmark, and their shared code."""
