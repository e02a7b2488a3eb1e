// Package jsonfile reads files of JSON that this program wrote.
package jsonfile

import (
	"encoding/json"
	"fmt"
	"os"
)

// Read decodes the file at path into v. The error names the file; it is
// fs.ErrNotExist where there is none.
func Read(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
