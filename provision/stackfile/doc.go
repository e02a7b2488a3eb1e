// Package stackfile reads stack.yaml, the file that says which components make
// the service of a rack, and turns it with the templates, manifests and
// container images beside it into a provision.Stack.
//
// Reading is strict, as of the rack file: whatever cannot work is refused, all
// at once, each mistake with its file, line and column. Every template is tried
// on made-up racks, and every container image is hashed.
//
// The stack that comes with the program is in the folder default.
// docs/stack.schema.json is the file's JSON Schema, for editors.
package stackfile
