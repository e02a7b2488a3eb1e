package hostprep

import (
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// writeFile replaces a file as a whole, durably.
func writeFile(path, text string) error {
	dir := filepath.Dir(path)
	if err := renameio.WriteFile(path, []byte(text), 0o644, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o644)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
