package provision

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"
)

// Orders about the life of the stack around its members. Their args and results
// are named alike.
const (
	// OrderBackup sends what users would miss as parts: BackupArgs, BackupResult.
	OrderBackup OrderKind = "backup"
	// OrderLoad puts parts of a backup beside what is there and changes nothing
	// that users see: RestoreArgs, no result.
	OrderLoad OrderKind = "restore-load"
	// OrderReplace puts what was loaded in the place of what is there:
	// RestoreArgs, ReplaceResult. It is early: after a power cut ejabberd, which
	// the others have stopped, may not start before it goes on.
	OrderReplace OrderKind = "restore-replace"
	// OrderForget removes a dead node from every component's cluster:
	// ForgetArgs, ForgetResult.
	OrderForget OrderKind = "forget"
)

// Parts of a backup of one node.
const (
	PartDatabase = "database" // pg_dump's custom format
	PartUploads  = "uploads"  // tar of the files that users have uploaded to this node
)

// CodeNoDatabase is the code of the failure where a node cannot do what has to
// do with the database, and another one may.
const CodeNoDatabase = "no-database"

// MaxPart bounds one part of an order, in bytes.
const MaxPart = 1 << 42

var partName = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// ValidPartName tells whether an order may have a part of that name.
func ValidPartName(name string) bool { return partName.MatchString(name) }

// BackupPart is what one node sends or gets for an order beside its result, as a
// stream of bytes.
type BackupPart struct {
	Node   string `json:"node"`
	Name   string `json:"name"`
	Size   int64  `json:"size"`   // bytes
	SHA256 string `json:"sha256"` // hex
}

// File is the part's name inside the backup.
func (p BackupPart) File() string { return p.Node + "/" + p.Name }

// BackupArgs say what a node sends.
type BackupArgs struct {
	Database bool `json:"database"` // beside its users' files
}

// BackupResult is what a node has sent.
type BackupResult struct {
	Parts  []BackupPart `json:"parts"`
	Rack   string       `json:"rack"`
	Domain string       `json:"domain"`
	// Of the node that sent the database.
	PostgreSQL string         `json:"postgresql,omitempty"` // version
	Ejabberd   string         `json:"ejabberd,omitempty"`   // version
	Schema     map[string]int `json:"schema,omitempty"`     // version of ejabberd's tables, by module
}

// BackupFormat is the format of a backup.
const BackupFormat = 1

// BackupManifest says what a backup holds. It is the backup's file
// manifest.json.
type BackupManifest struct {
	Format     int            `json:"format"` // BackupFormat
	ID         string         `json:"id"`     // random
	Rack       string         `json:"rack"`
	Domain     string         `json:"domain"`
	Begun      time.Time      `json:"begun"`
	PostgreSQL string         `json:"postgresql"`
	Ejabberd   string         `json:"ejabberd"`
	Schema     map[string]int `json:"schema"`
	Parts      []BackupPart   `json:"parts"`
	// Missing are nodes that could not be asked for their users' files.
	Missing []string `json:"missing,omitempty"`
}

// Check says why the backup cannot be restored at all.
func (m BackupManifest) Check() error {
	var wrong []error
	if m.Format != BackupFormat {
		return fmt.Errorf("it has format %d, this program knows %d", m.Format, BackupFormat)
	}
	if m.ID == "" {
		wrong = append(wrong, errors.New("it has no ID"))
	}
	databases, seen := 0, map[string]bool{}
	for _, p := range m.Parts {
		switch {
		case p.Name == PartDatabase:
			databases++
		case p.Name != PartUploads:
			wrong = append(wrong, fmt.Errorf("it has the part %.80q, which this program does not know", p.File()))
		}
		if seen[p.File()] {
			wrong = append(wrong, fmt.Errorf("it has the part %.80q twice", p.File()))
		}
		seen[p.File()] = true
	}
	if databases != 1 {
		wrong = append(wrong, fmt.Errorf("it has %d databases instead of one", databases))
	}
	return errors.Join(wrong...)
}

// RestoreArgs say what a node does of a restore.
type RestoreArgs struct {
	ID string `json:"id"` // of the restore
	// Rack and Domain are those of the backup. A node of others refuses it,
	// unless OtherSite says that this is known.
	Rack      string         `json:"rack"`
	Domain    string         `json:"domain"`
	OtherSite bool           `json:"other_site,omitempty"`
	Schema    map[string]int `json:"schema,omitempty"`
	// Parts are those for this node. With the database among them the node also
	// is the one that puts it in place.
	Parts []BackupPart `json:"parts"`
}

// Part returns the part of that name.
func (a RestoreArgs) Part(name string) (BackupPart, bool) {
	i := slices.IndexFunc(a.Parts, func(p BackupPart) bool { return p.Name == name })
	if i < 0 {
		return BackupPart{}, false
	}
	return a.Parts[i], true
}

// ReplaceResult tells which data a node has in the end.
type ReplaceResult struct {
	New bool `json:"new"` // those of the backup
}

// ForgetArgs name the node that is gone.
type ForgetArgs struct {
	Node string `json:"node"`
}

// ForgetResult tells from which components' clusters, as far as the node that
// was asked is in them, the dead one was removed, and which did not know it.
type ForgetResult struct {
	Removed []string `json:"removed"`
	Unknown []string `json:"unknown"`
}

// NewerSchema lists the modules whose tables are newer in the backup than here.
func NewerSchema(backup, here map[string]int) []string {
	var out []string
	for _, module := range slices.Sorted(maps.Keys(backup)) {
		if mine, ok := here[module]; ok && backup[module] > mine {
			out = append(out, module)
		}
	}
	return out
}
