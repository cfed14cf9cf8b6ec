"""Numbers about quality: baselines, protocols, other models, results; folders of measures and of studies."""
