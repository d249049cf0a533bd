"""From stored runs to figures, tables, pictures, comparisons and published results."""
