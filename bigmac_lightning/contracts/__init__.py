"""What users implement, or pass: components, modules, batches."""
