package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestAnArchiveNamesTheLayerByItsContent(t *testing.T) {
	folder := t.TempDir()
	program, path := filepath.Join(folder, "program"), filepath.Join(folder, "image.tar")
	if err := os.WriteFile(program, []byte("content"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Archive(path, "localhost/x:1", program, "argument"); err != nil {
		t.Fatal(err)
	}
	files := unpack(t, path)
	var config struct {
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(files["config.json"], &config); err != nil {
		t.Fatal(err)
	}
	if got, want := config.Rootfs.DiffIDs[0], digest(files["layer.tar"]); got != want {
		t.Errorf("layer is named %s, is %s", got, want)
	}
	if got := unpackBytes(t, files["layer.tar"])["program"]; string(got) != "content" {
		t.Errorf("program is %q", got)
	}
}

func unpack(t *testing.T, path string) map[string][]byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return unpackBytes(t, content)
}

func unpackBytes(t *testing.T, content []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	reader := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(reader); err != nil {
			t.Fatal(err)
		}
	}
}
