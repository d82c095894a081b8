"""What is not the plugin: the demo, the GLUE runner, the benchmark, and what they share."""
