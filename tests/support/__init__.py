"""What tests share: nodes in this process, participants that do as they are told, logs led by hand."""
