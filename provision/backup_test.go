package provision

import (
	"slices"
	"testing"
)

func TestBackupManifest(t *testing.T) {
	good := BackupManifest{Format: BackupFormat, ID: "12ab", Parts: []BackupPart{{Node: "node1", Name: PartDatabase}, {Node: "node1", Name: PartUploads}, {Node: "node2", Name: PartUploads}}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*BackupManifest){
		"another format": func(m *BackupManifest) { m.Format++ },
		"no ID":          func(m *BackupManifest) { m.ID = "" },
		"no database":    func(m *BackupManifest) { m.Parts = m.Parts[1:] },
		"two databases":  func(m *BackupManifest) { m.Parts[1].Name, m.Parts[1].Node = PartDatabase, "node3" },
		"a part twice":   func(m *BackupManifest) { m.Parts[2].Node = "node1" },
		"unknown part":   func(m *BackupManifest) { m.Parts[1].Name = "shadow" },
	} {
		m := good
		m.Parts = slices.Clone(m.Parts)
		change(&m)
		if m.Check() == nil {
			t.Errorf("%s is not found", what)
		}
	}
}

func TestNewerSchema(t *testing.T) {
	here := map[string]int{"mod_mam": 2, "mod_muc": 1}
	if got := NewerSchema(map[string]int{"mod_mam": 2, "mod_muc": 0, "mod_else": 9}, here); got != nil {
		t.Errorf("%v", got)
	}
	if got := NewerSchema(map[string]int{"mod_mam": 3, "mod_muc": 2}, here); !slices.Equal(got, []string{"mod_mam", "mod_muc"}) {
		t.Errorf("%v", got)
	}
}

func TestPartName(t *testing.T) {
	for name, good := range map[string]bool{"database": true, "a-1": true, "": false, "../x": false, "A": false, "a/b": false} {
		if ValidPartName(name) != good {
			t.Errorf("%q", name)
		}
	}
}
