"""What the dashboard's views share: selection, cached readers, figures. Imports neither torch nor the model."""
