"""Numbers about quality: metrics, Fréchet distances, protocols, results, studies."""
