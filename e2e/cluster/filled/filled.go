// Package filled fills in the configuration files that are kept beside the code as templates.
package filled

import (
	"bytes"
	"os"
	"path/filepath"
	"text/template"
)

// Template is the text with the values in it. A value that the text names and the map lacks is an error.
func Template(text string, values map[string]string) ([]byte, error) {
	parsed, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, err
	}
	var filled bytes.Buffer
	err = parsed.Execute(&filled, values)
	return filled.Bytes(), err
}

// Write writes the filled text, and makes the folder for it.
func Write(path, text string, values map[string]string) error {
	filled, err := Template(text, values)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, filled, 0o644)
}
