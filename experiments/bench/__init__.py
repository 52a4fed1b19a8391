"""The benches: which rule, code or defence wins, each tuned by one budget and measured on other runs."""
